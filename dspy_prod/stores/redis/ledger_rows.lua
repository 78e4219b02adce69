-- Rows, what is no longer kept, and what a commit asks for.

local function put_row(base, id, at, body, stamp, ttl, look)
    local rows, row = base .. ':rows', decoded(body)
    if not row then return end
    local old = redis.call('HGET', rows, id)
    if old then
        old = row_of(old)
        if old then
            undo(base, old)
            for _, field in ipairs(FIELDS) do
                if type(old[field]) == 'string' and old[field] ~= row[field] then
                    redis.call('ZREM', of_row(base, field, old[field]), id)
                end
            end
        end
    elseif look then
        bury(base, id)
    end
    redis.call('HSET', rows, id, stamp .. '|' .. body)
    redis.call('ZADD', base .. ':at', at, id)
    for _, field in ipairs(FIELDS) do
        local value = row[field]
        if type(value) == 'string' then
            local key = of_row(base, field, value)
            redis.call('ZADD', key, at, id)
            renew(key, ttl)
        end
    end
end

-- What is no longer kept ---------------------------------------------------------------------------------------------
local function drop_row(base, id, value)
    local row = row_of(value)
    for _, field in ipairs(FIELDS) do
        if row and type(row[field]) == 'string' then redis.call('ZREM', of_row(base, field, row[field]), id) end
    end
    redis.call('HDEL', base .. ':rows', id)
    redis.call('ZREM', base .. ':at', id)
    return 1
end

local function drop_page(base, number, value)
    local size = tonumber(string.match(value or '', '^%d+:(%d+)|') or '0')
    for key in pairs(keys_of(base, page_of(value))) do redis.call('ZREM', key, number) end
    local gone = redis.call('HGET', base .. ':gone', number)
    if gone then size = size - #(decoded('[' .. gone .. ']') or {}) end
    redis.call('DECRBY', base .. ':hits', size)
    redis.call('HDEL', base .. ':page', number)
    redis.call('HDEL', base .. ':gone', number)
    redis.call('ZREM', base .. ':paged', number)
    if redis.call('EXISTS', base .. ':paged') == 0 then redis.call('DEL', base .. ':hits') end
    return math.max(size, 1)
end

local function trim(base, keep, most, left)
    local count = redis.call('HLEN', base .. ':rows') + redis.call('HLEN', base .. ':loose')
    count = count + tonumber(redis.call('GET', base .. ':hits') or '0')
    local oldest = today() - keep
    while left > 0 do
        local row = redis.call('ZRANGE', base .. ':at', 0, 0, 'WITHSCORES')
        local page = redis.call('ZRANGE', base .. ':paged', 0, 0, 'WITHSCORES')
        if not row[1] and not page[1] then return end
        local is_row = row[1] and (not page[1] or tonumber(row[2]) <= tonumber(page[2]))
        local key, member = base .. (is_row and ':rows' or ':page'), is_row and row[1] or page[1]
        local value = redis.call('HGET', key, member)
        local stamp = value and tonumber(string.match(value, '^(%d+)[:|]'))
        if stamp and stamp >= oldest and (most < 0 or count <= most) then return end
        local gone = is_row and drop_row(base, member, value) or not is_row and drop_page(base, member, value)
        count, left = count - gone, left - gone
    end
end

-- The operations -------------------------------------------------------------------------------------------------
local operations = {}

-- day, seconds that it is kept; then dimension, value, the ten sums with commas between
function operations.sums(base, arguments)
    local day, ttl = arguments[2], arguments[3]
    for index = 4, #arguments, 3 do
        local dimension, numbers = arguments[index], {}
        for number in string.gmatch(arguments[index + 2], '[^,]+') do numbers[#numbers + 1] = number end
        add(base, day, dimension, place(base, day, dimension, arguments[index + 1], ttl), numbers, ttl)
    end
end

-- seconds, whether they may be hits; then id, time, body
function operations.rows(base, arguments)
    local stamp, ttl, look = today(), arguments[2], arguments[3] == '1'
    for index = 4, #arguments, 3 do
        put_row(base, arguments[index], arguments[index + 1], arguments[index + 2], stamp, ttl, look)
    end
end

-- seconds; then id, what is its own, what it has in common with others
function operations.loose(base, arguments)
    local loose, ttl = base .. ':loose', arguments[2]
    for index = 3, #arguments, 3 do
        local id = arguments[index]
        local old = redis.call('HGET', base .. ':rows', id)
        if old then
            undo(base, row_of(old) or {})
            drop_row(base, id, old)
        else
            bury(base, id)
        end
        redis.call('HSET', loose, id, arguments[index + 1] .. '\n' .. arguments[index + 2])
    end
    if redis.call('HLEN', loose) >= LEAST then compact(base, ttl) end
end

-- seconds; then pages
function operations.pages(base, arguments)
    for index = 3, #arguments do add_page(base, arguments[index], arguments[2]) end
end

-- seconds, days, most records (-1: any number), how many may be dropped
function operations.trim(base, arguments)
    for _, name in ipairs({'rows', 'at', 'loose', 'page', 'paged', 'gone', 'hits', 'numbered'}) do
        redis.call('EXPIRE', base .. ':' .. name, arguments[2])
    end
    trim(base, tonumber(arguments[3]), tonumber(arguments[4]), tonumber(arguments[5]))
end

return function(base, arguments)
    renewed = {}
    operations[arguments[1]](base, arguments)
    return 1
end
