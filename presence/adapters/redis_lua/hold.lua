-- Take or keep a lease on a piece of work (DESIGN §4, Relay).
-- ARGV[2] name of the work  [3] instance  [4] ms
-- Returns: 1 held by this instance, 0 by another.
local name = BASE .. 'holder:' .. ARGV[2]
local holder = redis.call('GET', name)
if holder and holder ~= ARGV[3] then return 0 end
redis.call('SET', name, ARGV[3], 'PX', ARGV[4])
return 1
