-- Keep a relay's cursor, and read on from it (DESIGN §4, Relay).
-- ARGV[2] cursor's name  [3] version up to which the sink has taken the changes (0: leave it)  [4] epoch they were read in
--         [5] how many changes at most
-- Returns: the highest version trimmed off the stream if the cursor had not reached it, else 0; the epoch ('': no sweep
--          has met this server); the changes behind the cursor, as XRANGE gives them.
-- Never moves the cursor back; nor on by what was read in another epoch: a primary that lost it may give out versions
-- below it by now.
local name = BASE .. 'cursor:' .. ARGV[2]
local at, trimmed = tonumber(redis.call('GET', name)) or 0, tonumber(redis.call('GET', BASE .. 'trimmed')) or 0
local amnesty = redis.call('HMGET', BASE .. 'amnesty', 'epoch', 'server')
local epoch = amnesty[2] == server and amnesty[1] or ''
if epoch ~= '' and epoch == ARGV[4] then at = math.max(at, tonumber(ARGV[3])) end
redis.call('SET', name, int(at), 'PX', LONG)
redis.call('SADD', BASE .. 'cursors', ARGV[2])
if at < trimmed then return { trimmed, epoch, {} } end
return { 0, epoch, redis.call('XRANGE', CHANGES, '(' .. entry_id(at), '+', 'COUNT', ARGV[5]) }
