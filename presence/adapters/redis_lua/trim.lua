-- Trim the stream of changes: what is old and behind every cursor, and the oldest above the cap (DESIGN §3.8).
-- ARGV[2] ms for which changes are kept  [3] cap in changes
-- Returns: how many were trimmed. XTRIM leaves no mark that a reader could see: hence `presence:trimmed`.
local cut = now_us - tonumber(ARGV[2]) * 1000
for _, name in ipairs(redis.call('SMEMBERS', BASE .. 'cursors')) do
  local at = redis.call('GET', BASE .. 'cursor:' .. name)
  if at then cut = math.min(cut, tonumber(at)) else redis.call('SREM', BASE .. 'cursors', name) end
end
local function version_of(id)
  local ms, us = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms) * 1000 + tonumber(us)
end
local over = redis.call('XLEN', CHANGES) - tonumber(ARGV[3])
if over > 0 then
  local oldest = redis.call('XRANGE', CHANGES, '-', '+', 'COUNT', math.min(over, 1000))
  cut = math.max(cut, version_of(oldest[#oldest][1]))
end
local count = redis.call('XTRIM', CHANGES, 'MINID', entry_id(cut + 1))
if count > 0 then
  redis.call('SET', BASE .. 'trimmed', int(math.max(cut, tonumber(redis.call('GET', BASE .. 'trimmed')) or 0)))
end
return count
