-- One commit: checks that what was decided on is still so, then applies everything, or nothing.
--
-- KEYS: 1 meta (born, n, terms, board, kept, total), 2 owners, 3 lock, 4 turns, 5 done (of this owner), 6 names, 7 ends,
-- 8 terms, then those that the commit names.
-- ARGV: 1 the header as JSON; then texts that it names by their place; then the commands: name, key, count, arguments.
-- Integers of money are text: Lua's numbers are exact to 2^53 only.
local head = cjson.decode(ARGV[1])
local meta = redis.call('HMGET', KEYS[1], 'born', 'n', 'terms', 'board', 'kept', 'total')
local time = redis.call('TIME')
local me = head.me

local function say(status, ...)
    return {status, meta[1] or '', meta[2] or '0', meta[3] or '0', time[1], time[2], meta[4] or '0', ...}
end

-- Was it here before? Its answer may have been lost, or it may come late, behind others of the same owner.
local last = redis.call('GET', KEYS[5])
last = last and cmsgpack.unpack(last)
if last and head.seq <= last[1] then
    if head.seq == last[1] and last[2] ~= '' then
        return say('done', last[2], last[3])
    end
    return say('void')
end

-- What others have seen may be reached again after a loss; what this owner was answered last, only by itself.
if meta[1] ~= head.born or tonumber(meta[2] or '0') < head.seen or (last and last[1] or 0) < head.last then
    return say('lost')
end

-- Is what it was decided on still so?
local stale = false
local unowned = head.leased and not redis.call('ZSCORE', KEYS[2], me)
if unowned or (head.terms and (meta[3] or '0') ~= head.terms) then stale = true end

local accounts = {}
for place, each in ipairs(head.accounts) do -- key, version, exact, limit, spent, held, unconfirmed, ...
    local now = redis.call('HMGET', KEYS[each[1]], 's', 'h', 'u', 'v')
    accounts[place] = now
    if (now[4] or '') ~= each[2] then
        if each[3] then
            stale = true
        elseif each[4] ~= '' then
            local total = tonumber(now[1] or '0') + tonumber(now[2] or '0') + tonumber(each[5]) + tonumber(each[6])
            if total > tonumber(each[4]) then stale = true end
        end
    end
end

local limiters = {}
for place, each in ipairs(head.limiters) do -- key, version, state, settings
    limiters[place] = false
    if (redis.call('HGET', KEYS[each[1]], 'v') or '') ~= each[2] then
        stale = true
        limiters[place] = redis.call('HMGET', KEYS[each[1]], 'd', 'c', 'v')
    end
end

for _, each in ipairs(head.reaped) do -- owner, lease as it was seen, hashes and ids of holds, its hashes, how many are all
    if tonumber(redis.call('ZSCORE', KEYS[2], each[1]) or '-1') ~= each[2] then stale = true end
    for _, hold in ipairs(each[3]) do
        if redis.call('HEXISTS', KEYS[hold[1]], hold[2]) == 0 then stale = true end
    end
    local count = 0
    for _, hash in ipairs(each[4]) do count = count + redis.call('HLEN', KEYS[hash]) end
    if each[5] >= 0 and count ~= each[5] then stale = true end
end
for _, key in ipairs(head.forgiven) do
    if redis.call('EXISTS', KEYS[key]) == 0 then stale = true end
end

-- Who found something changed again and again has it to himself for a moment; others that want the same come after, in
-- turn.
local holder = redis.call('HGET', KEYS[3], 'owner')
if holder and holder ~= me and head.contends then
    local meets = redis.call('HEXISTS', KEYS[3], '*') == 1
    for _, list in ipairs({head.accounts, head.limiters}) do
        for _, each in ipairs(list) do
            meets = meets or redis.call('HEXISTS', KEYS[3], KEYS[each[1]]) == 1
        end
    end
    if meets then
        if not redis.call('LPOS', KEYS[4], me) then redis.call('RPUSH', KEYS[4], me) end
        redis.call('PEXPIRE', KEYS[4], head.patience)
        redis.call('SET', KEYS[5], cmsgpack.pack({head.seq, '', {}}), 'PX', head.remember)
        return say('wait', unowned and 1 or 0, accounts, limiters)
    end
end
if stale then
    local mine = 0
    if head.insists and (not holder or holder == me) then
        mine = 1
        if not holder then redis.call('HSET', KEYS[3], 'owner', me) end
        for _, list in ipairs({head.accounts, head.limiters}) do
            for _, each in ipairs(list) do redis.call('HSET', KEYS[3], KEYS[each[1]], 1) end
        end
        redis.call('PEXPIRE', KEYS[3], head.lock)
        redis.call('LREM', KEYS[4], 0, me)
    end
    redis.call('SET', KEYS[5], cmsgpack.pack({head.seq, '', {}}), 'PX', head.remember)
    return say('again', unowned and 1 or 0, accounts, limiters, mine)
end

-- From here on nothing may raise: what is written stays. So it is seen first, by what changes nothing, whether this user
-- may do what cannot be done without (meta is there: SET with NX leaves it as it is).
redis.call('PTTL', KEYS[1])
redis.call('SET', KEYS[1], '', 'NX')
local n = tostring(redis.call('HINCRBY', KEYS[1], 'n', 1))
meta[2] = n

-- All that tells of the whole namespace goes some time after its last use, but for what accounts that count for ever need.
local function keep(key)
    if key == KEYS[1] or key == KEYS[7] or not meta[6] then redis.pcall('PEXPIRE', key, head.kept) end
end
for _, each in ipairs(head.accounts) do
    if each[8] == 0 and not meta[6] then
        meta[6] = '1'
        redis.pcall('HSET', KEYS[1], 'total', meta[6])
        for key = 6, 8, 2 do redis.pcall('PERSIST', KEYS[key]) end
    end
end
local today = tostring(math.floor(tonumber(time[1]) / 86400))
if meta[5] ~= today then
    redis.pcall('HSET', KEYS[1], 'kept', today)
    for _, key in ipairs({1, 6, 7, 8}) do keep(KEYS[key]) end
end

for place, each in ipairs(head.accounts) do -- ..., lifetime (0: for ever, -1: unknown), name, window's dearest, ends at
    local key = KEYS[each[1]]
    if each[8] then
        for part, field in ipairs({'s', 'h', 'u'}) do
            if each[4 + part] ~= '0' then redis.pcall('HINCRBY', key, field, each[4 + part]) end
        end
        redis.pcall('HSET', key, 'v', n)
        local now = redis.pcall('HMGET', key, 's', 'h', 'u', 'v')
        accounts[place] = now
        if redis.pcall('ZADD', KEYS[6], 0, each[9]) == 1 then keep(KEYS[6]) end
        if each[10] > 0 then redis.pcall('ZADD', KEYS[each[10]], now[1] or '0', each[9]) end
        local lasts = each[8]
        if lasts < 0 then lasts = redis.pcall('PTTL', key) == -1 and head.kept or 0 end
        -- Never shorter than before: others may have used it since, or go by a wall clock that was ahead.
        if lasts > redis.pcall('PTTL', key) + 1000 then
            redis.pcall('PEXPIRE', key, lasts)
            if redis.pcall('ZADD', KEYS[7], each[11], each[9]) == 1 then keep(KEYS[7]) end
            local window = each[10] > 0 and KEYS[each[10]]
            if window and lasts > redis.pcall('PTTL', window) then redis.pcall('PEXPIRE', window, lasts) end
        end
    end
end
for _, each in ipairs(head.limiters) do
    if each[3] > 0 then
        redis.pcall('HSET', KEYS[each[1]], 'd', ARGV[each[3]], 'c', ARGV[each[4]], 'v', n)
        redis.pcall('PEXPIRE', KEYS[each[1]], head.limiter)
    end
end
if head.told then meta[3] = n redis.pcall('HSET', KEYS[1], 'terms', n) end

local replies = {}
local at = head.first
for place = 1, head.count do
    local name, key, count = ARGV[at], KEYS[tonumber(ARGV[at + 1])], tonumber(ARGV[at + 2])
    local step, reply = STEPS[name], nil
    if step then
        local arguments = {}
        for number = 1, count do arguments[number] = ARGV[at + 2 + number] end
        local fine
        fine, reply = pcall(step, key, arguments)
        if not fine then reply = {err = 'ERR ' .. tostring(type(reply) == 'table' and reply.err or reply)} end
    else
        reply = redis.pcall(name, key, unpack(ARGV, at + 3, at + 2 + count))
    end
    if reply == nil then reply = false end
    replies[place] = reply
    at = at + 3 + count
end
if head.told then keep(KEYS[8]) end

redis.call('SET', KEYS[5], cmsgpack.pack({head.seq, n, head.replies and replies or {}}), 'PX', head.remember)
if holder == me then
    redis.pcall('DEL', KEYS[3])
    local following = redis.pcall('LPOP', KEYS[4])
    if type(following) == 'string' then
        redis.pcall('HSET', KEYS[3], 'owner', following, '*', 1)
        redis.pcall('PEXPIRE', KEYS[3], head.lock)
        redis.pcall('RPUSH', head.bells .. following, '1')
        redis.pcall('PEXPIRE', head.bells .. following, head.patience)
    end
elseif head.locked then
    redis.pcall('LREM', KEYS[4], 0, me)
end
return say('ok', accounts, replies)
