-- Make sessions; their users are online if they were not (guide, Online Flow).
-- ARGV[2…] per session: user, session, device, lease ms (0 and below: lapsed meanwhile, so that nothing is made),
--          idle ms since its last activity, reason, limit of open connections of the user (0: none), open connections of
--          the user without a lease here
-- Returns per session: -1 refused by the limit, 0 no change, else the change's version.
-- Sessions of the user that are open connections: with a lease, and not lost.
local function open_connections(user)
  local sessions = key(user, 'sessions')
  local count = redis.call('ZCOUNT', sessions, '(' .. now, '+inf')  -- one that lapsed is among those without a lease
  for _, session in ipairs(redis.call('HKEYS', key(user, 'lost'))) do
    local deadline = redis.call('ZSCORE', sessions, session)
    if deadline and tonumber(deadline) > now then
      count = count - 1
    end
  end
  return count
end

local out = {}
for i = 2, #ARGV, 8 do
  local user, session, device, reason = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 5]
  local lease, limit, without_lease = tonumber(ARGV[i + 3]), tonumber(ARGV[i + 6]), tonumber(ARGV[i + 7])
  if
    limit > 0
    and not redis.call('ZSCORE', key(user, 'sessions'), session)
    and open_connections(user) + without_lease >= limit
  then
    out[#out + 1] = -1
  elseif lease <= 0 then
    out[#out + 1] = 0
  else
    set_lease(user, session, device, now + lease)
    touch(user, tonumber(ARGV[i + 4]))
    out[#out + 1] = redis.call('SISMEMBER', ONLINE, user) == 1 and 0 or change(user, '1', device, reason)
  end
end
return out
