-- Hits, many to a page: what some of them have in common once. See `hits.py`.

local function like(template, each)
    local row = {}
    for name, value in pairs(template) do row[name] = value end
    row.id, row.call_id, row.started_at, row.saved_nano = each[1], each[2], each[3], each[4]
    return row
end

-- What a page is looked up by.
local function keys_of(base, groups)
    local keys = {}
    for _, group in ipairs(groups) do
        for _, field in ipairs(FIELDS) do
            local value = group[1][field]
            if type(value) == 'string' then keys[of_page(base, field, value)] = true end
        end
        for _, each in ipairs(group[2]) do
            keys[of_page(base, 'id', each[1])] = true
            keys[of_page(base, 'call_id', each[2])] = true
        end
    end
    return keys
end

local function add_page(base, text, ttl)
    local groups = groups_of(text)
    local last, size = -math.huge, 0
    for _, group in ipairs(groups) do
        for _, each in ipairs(group[2]) do
            last, size = math.max(last, each[3]), size + 1
        end
    end
    local number = string.format('%012d', redis.call('INCR', base .. ':numbered'))
    local score = string.format('%.17g', last)
    redis.call('HSET', base .. ':page', number, today() .. ':' .. size .. '|' .. text)
    redis.call('ZADD', base .. ':paged', score, number)
    redis.call('INCRBY', base .. ':hits', size)
    for key in pairs(keys_of(base, groups)) do
        redis.call('ZADD', key, score, number)
        renew(key, ttl)
    end
end

-- Make pages of what is loose: in the order of time, none longer than it may be.
local function compact(base, ttl)
    local all = {}
    for _, text in ipairs(redis.call('HVALS', base .. ':loose')) do
        local own, template, each = loose_of(text)
        if own then all[#all + 1] = {each[3], own, template} end
    end
    table.sort(all, function(one, other) return one[1] < other[1] end)
    local first, order, groups, size = 0, {}, {}, 0
    local function close()
        local texts = {}
        for index, template in ipairs(order) do
            texts[index] = '[' .. template .. ',[' .. table.concat(groups[template], ',') .. ']]'
        end
        if size > 0 then add_page(base, '[' .. table.concat(texts, ',') .. ']', ttl) end
        order, groups, size = {}, {}, 0
    end
    for _, hit in ipairs(all) do
        if size >= PAGE or (size > 0 and hit[1] - first > SPREAD) then close() end
        if size == 0 then first = hit[1] end
        local others = groups[hit[3]]
        if not others then
            others = {}
            groups[hit[3]] = others
            order[#order + 1] = hit[3]
        end
        others[#others + 1] = hit[2]
        size = size + 1
    end
    close()
    redis.call('DEL', base .. ':loose')
end

-- A text as orjson writes it.
local function quoted(text)
    return (string.gsub(cjson.encode(text), '\\/', '/'))
end

-- A hit that is replaced is one no more.
local function bury(base, id)
    local text = redis.call('HGET', base .. ':loose', id)
    if text then
        local own, template, each = loose_of(text)
        redis.call('HDEL', base .. ':loose', id)
        if own then undo(base, like(decoded(template), each)) end
        return
    end
    for _, number in ipairs(redis.call('ZRANGE', of_page(base, 'id', id), 0, -1)) do
        local body = redis.call('HGET', base .. ':page', number) or ''
        local groups = string.find(body, quoted(id), 1, true) and page_of(body)
        local gone = redis.call('HGET', base .. ':gone', number)
        local ids = gone and decoded('[' .. gone .. ']') or {}
        for _, other in ipairs(ids) do
            if other == id then return end
        end
        for _, group in ipairs(groups or {}) do
            for _, each in ipairs(group[2]) do
                if each[1] == id then
                    redis.call('HSET', base .. ':gone', number, (gone and gone .. ',' or '') .. cjson.encode(id))
                    redis.call('DECR', base .. ':hits')
                    undo(base, like(group[1], each))
                    return
                end
            end
        end
    end
end
