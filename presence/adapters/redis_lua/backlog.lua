-- Keep a relay's cursor (DESIGN §4, Relay).
-- ARGV[2] cursor's name  [3] version up to which the sink has taken the changes (0: leave it)
-- Returns: the cursor's version, the highest version trimmed off the stream. Never moves the cursor back.
local name = BASE .. 'cursor:' .. ARGV[2]
local at, trimmed = tonumber(redis.call('GET', name)) or 0, tonumber(redis.call('GET', BASE .. 'trimmed')) or 0
at = math.max(at, tonumber(ARGV[3]))
redis.call('SET', name, int(at), 'PX', LONG)
redis.call('SADD', BASE .. 'cursors', ARGV[2])
return { at, trimmed }
