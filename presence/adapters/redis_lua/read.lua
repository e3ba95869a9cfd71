-- Read statuses, all at one moment. Words in one string each way: a hundred users are half as dear as in lists.
-- ARGV[2] users
-- Returns: 1 when "offline" is certain, else 0; then per user: online 1 or 0, version, last active ms ('' when unknown).
local out = {}
for user in string.gmatch(ARGV[2], '%S+') do
  out[#out + 1] = redis.call('SISMEMBER', ONLINE, user)
  out[#out + 1] = redis.call('HGET', key(user, 'change'), 'version') or '0'
  out[#out + 1] = redis.call('GET', key(user, 'last_active')) or ''
end
return { settled() and 1 or 0, table.concat(out, ' ') }
