-- Leave sessions whose connection is gone a shorter lease (WIRE §4: grace, drain). The sweep does the rest.
-- ARGV[2…] per session: user, session, reason kept for the end, idle ms since its last activity, rest of the lease in ms
-- Returns per session: 1 shortened, 0 it had ended already.
local out = {}
for i = 2, #ARGV, 5 do
  local user = ARGV[i]
  local found = shorten(user, ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 4]))
  if found then touch(user, tonumber(ARGV[i + 3])) end
  out[#out + 1] = found and 1 or 0
end
return out
