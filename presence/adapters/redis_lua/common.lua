-- What all transitions share; put before each of the other scripts (DESIGN §3).
-- KEYS[1]  the partition's online set, `presence:online` with its hash tag if there is one. All other keys share its slot.
-- ARGV[1]  floor: the highest version the caller has seen, integer
-- ARGV[#ARGV]  run id of this server; taken off, so that the other scripts do not meet it
-- Times are ms of the Unix epoch on Redis' own clock; versions are µs of it. All numbers come as strings.
-- Scripts do not roll back: what can fail (XADD) comes before what decides (SADD, SREM).
local ONLINE = KEYS[1]
local BASE = string.sub(ONLINE, 1, -7) -- 'presence:' with its tag
local DEADLINES, CHANGES, VERSION = BASE .. 'deadlines', BASE .. 'changes', BASE .. 'version'
local LONG = 90 * 24 * 3600 * 1000 -- ms that offline users are remembered
local floor = tonumber(ARGV[1])
local server = table.remove(ARGV)
local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now = math.floor(now_us / 1000)

local function int(n) return string.format('%.0f', n) end -- tostring would give 1.7e+15

local function entry_id(version) return int(math.floor(version / 1000)) .. '-' .. int(version % 1000) end

local function key(user, name) return BASE .. 'user:' .. user .. ':' .. name end

local function session_key(user, session) return key(user, 'online:' .. session) end

-- Note an activity of `idle` ms ago; never backwards. idle < 0: none.
local function touch(user, idle)
  if idle < 0 then return end
  local name = key(user, 'last_active')
  local at = now - idle
  if at > (tonumber(redis.call('GET', name)) or 0) then redis.call('SET', name, int(at), 'PX', LONG) end
end

local function set_lease(user, session, device, till)
  redis.call('SET', session_key(user, session), device, 'PXAT', int(till))
  redis.call('ZADD', key(user, 'sessions'), int(till), session)
  redis.call('ZADD', DEADLINES, int(till), user .. ':' .. session)
end

-- Leave the session `rest` ms of its lease at most, and keep the reason for the end. Returns false when it had ended.
local function shorten(user, session, reason, rest)
  local till = tonumber(redis.call('ZSCORE', key(user, 'sessions'), session))
  if not till then return false end
  local device = redis.call('GET', session_key(user, session)) or 'web'
  redis.call('HSET', key(user, 'lost'), session, reason)
  redis.call('PEXPIRE', key(user, 'lost'), LONG)
  set_lease(user, session, device, math.min(till, now + rest))
  return true
end

-- Append a change and take it over into the online set. Returns its version.
local function change(user, online, device, reason)
  local version = math.max((tonumber(redis.call('GET', VERSION)) or 0) + 1, floor + 1, now_us)
  local active = redis.call('GET', key(user, 'last_active')) or ''
  redis.call('XADD', CHANGES, entry_id(version), 'user', user, 'online', online, 'device', device, 'lastActive', active, 'reason', reason)
  redis.call('SET', VERSION, int(version))
  local last = key(user, 'change')
  redis.call('HSET', last, 'version', int(version), 'online', online, 'device', device, 'reason', reason)
  if online == '1' then
    redis.call('PERSIST', last)
    redis.call('SADD', ONLINE, user)
  else
    redis.call('PEXPIRE', last, LONG)
    redis.call('SREM', ONLINE, user)
  end
  return version
end

-- The user is offline if no session is left. Returns the change's version, 0 when there is none.
local function offline_if_last(user, device, reason)
  if redis.call('ZCARD', key(user, 'sessions')) > 0 or redis.call('SISMEMBER', ONLINE, user) == 0 then return 0 end
  return change(user, '0', device, reason)
end

-- Take the session away. Returns false when it had ended already, else its device.
local function drop(user, session)
  if redis.call('ZREM', key(user, 'sessions'), session) == 0 then return false end
  local device = redis.call('GET', session_key(user, session)) or redis.call('HGET', key(user, 'change'), 'device') or 'web'
  redis.call('DEL', session_key(user, session))
  redis.call('ZREM', DEADLINES, user .. ':' .. session)
  redis.call('HDEL', key(user, 'lost'), session)
  return device
end

-- False while the store has just come back, also before a sweep has met it: nobody may be called offline (DESIGN §3.6).
local function settled()
  local swept = tonumber(redis.call('GET', BASE .. 'swept'))
  local amnesty = redis.call('HMGET', BASE .. 'amnesty', 'till', 'server')
  local till = tonumber(amnesty[1])
  return swept and till and math.abs(now - swept) <= 3000 and now >= till and amnesty[2] == server
end
