-- The ledger's step in a commit, together with `ledger_sums.lua`, `ledger_hits.lua` and `ledger_rows.lua`, which follow.
-- Keys and what is in them: `ledger_keys.py`.
--
-- Every key begins with the one that is given, and so has its hash tag: the names that follow are made of values that
-- are known here only, such as those of a record that is replaced. Nothing here may raise once something is written:
-- a script that fails halfway is not undone.
local FIELDS = {
    'call_id', 'trace_id', 'session', 'user', 'tenant', 'run', 'prompt_version', 'variant', 'experiment',
    'program', 'model', 'outcome',
}
local BUCKETS = {call_id = true, trace_id = true}
local ROUGH = {id = true, call_id = true}
local OTHER = '(other)'
local DAY = 86400
local LONGEST = 64 -- bytes of a value that stands in a key as it is
local LEAST, PAGE, SPREAD = 64, 256, 3600
local VALUES_OF_DAY = 20000

local function decoded(text)
    local fine, value = pcall(cjson.decode, text)
    if fine and type(value) == 'table' then return value end
    return nil
end

-- A key lives on. Once in a call is enough.
local renewed
local function renew(key, ttl)
    if not renewed[key] then
        renewed[key] = true
        redis.call('EXPIRE', key, ttl)
    end
end

local function today()
    return math.floor(tonumber(redis.call('TIME')[1]) / DAY)
end

-- How a value is looked up.
local function named(value)
    if #value > LONGEST then return '#' .. redis.sha1hex(value) end
    return value
end

local function of_row(base, field, value)
    if BUCKETS[field] then value = string.sub(redis.sha1hex(value), 1, 4) else value = named(value) end
    return base .. ':by:' .. field .. ':' .. value
end

local function of_page(base, field, value)
    if ROUGH[field] then value = string.sub(value, 1, -3) end
    return base .. ':paged:' .. field .. ':' .. named(value)
end

-- What was written, without what is no record: one that is damaged must not stop all others. -------------------------
local function row_of(value)
    return value and decoded(string.match(value, '^[%d:]+|(.*)$') or '')
end

local function whole(each)
    return type(each) == 'table' and type(each[1]) == 'string' and type(each[2]) == 'string'
        and type(each[3]) == 'number'
end

local function groups_of(text)
    local found = {}
    for _, group in ipairs(decoded(text) or {}) do
        if type(group) == 'table' and type(group[1]) == 'table' and type(group[2]) == 'table' then
            local kept = {}
            for _, each in ipairs(group[2]) do
                if whole(each) then kept[#kept + 1] = each end
            end
            found[#found + 1] = {group[1], kept}
        end
    end
    return found
end

local function page_of(value)
    return groups_of(value and string.match(value, '^[%d:]+|(.*)$') or '')
end

-- What is its own and what it has in common with others, as texts, and what is its own.
local function loose_of(text)
    local ends = string.find(text, '\n', 1, true)
    local each = ends and decoded(string.sub(text, 1, ends - 1))
    if each and whole(each) and decoded(string.sub(text, ends + 1)) then
        return string.sub(text, 1, ends - 1), string.sub(text, ends + 1), each
    end
end
