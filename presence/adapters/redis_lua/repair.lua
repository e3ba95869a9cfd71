-- Make online set, sessions and deadlines of users agree (guide, Stale Detection).
-- ARGV[2…] per user: user, a session of it that has a deadline ('' for none)
-- Returns: users taken offline, users taken online, deadlines added, deadlines removed.
local gone, back, added, removed = 0, 0, 0, 0
if settled() then
  for i = 2, #ARGV, 2 do
    local user, session = ARGV[i], ARGV[i + 1]
    local sessions = redis.call('ZRANGE', key(user, 'sessions'), 0, -1, 'WITHSCORES')
    for j = 1, #sessions, 2 do
      added = added + redis.call('ZADD', DEADLINES, 'NX', sessions[j + 1], user .. ':' .. sessions[j])
    end
    if session ~= '' and not redis.call('ZSCORE', key(user, 'sessions'), session) then
      removed = removed + redis.call('ZREM', DEADLINES, user .. ':' .. session)
    end
    local online = redis.call('SISMEMBER', ONLINE, user)
    if online == 1 and #sessions == 0 then
      change(user, '0', redis.call('HGET', key(user, 'change'), 'device') or 'web', 'restored')
      gone = gone + 1
    elseif online == 0 and #sessions > 0 then
      change(user, '1', redis.call('GET', session_key(user, sessions[1])) or 'web', 'restored')
      back = back + 1
    end
  end
end
return { gone, back, added, removed }
