-- Take or keep a lease on a piece of work (DESIGN §4, Relay).
-- ARGV[2] name of the work  [3] instance  [4] ms, 0 gives it up
-- Returns: 1 held by this instance, 0 by another.
local name = BASE .. 'holder:' .. ARGV[2]
local holder = redis.call('GET', name)
if holder and holder ~= ARGV[3] then return 0 end
if ARGV[4] == '0' then redis.call('DEL', name) else redis.call('SET', name, ARGV[3], 'PX', ARGV[4]) end
return 1
