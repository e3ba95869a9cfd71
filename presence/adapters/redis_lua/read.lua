-- Read statuses, all at one moment.
-- ARGV[2…] users
-- Returns: 1 when "offline" is certain, else 0; then per user: online 1 or 0, version, last active ms ('' when unknown).
local out = { settled() and 1 or 0 }
for i = 2, #ARGV do
  local user = ARGV[i]
  out[#out + 1] = redis.call('SISMEMBER', ONLINE, user)
  out[#out + 1] = redis.call('HGET', key(user, 'change'), 'version') or '0'
  out[#out + 1] = redis.call('GET', key(user, 'last_active')) or ''
end
return out
