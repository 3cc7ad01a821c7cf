// Drawing a row's token from its logits, of one instruction-set level; see draw_jobs.h.
//
// The arithmetic of weighted_draw.py, operation by operation, so that a draw is the same with and without the kernels: nothing
// is fused that MLX computes apart. Sums of floats decide a power of two only, sums of weights are of whole numbers.

// A value as it is rounded here: compilers would otherwise fuse the product that it is with a sum that follows.
TQ_INLINE F rounded(F x) {
    asm("" : "+" TQ_VECTOR_REGISTER(x));
    return x;
}

// 2^x for x <= 0; see weighted_draw._exp2.
TQ_INLINE F exp2_apart(F x) {
    x = vmax(x, splat(-126.0f));
    const F shifted = rounded(x + 12582912.0f), rest = x - rounded(shifted - 12582912.0f);
    F power = rounded(rest * 1.535336188319500e-4f) + 1.339887440266574e-3f;
    for (float c : {9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f}) power = rounded(power * rest) + c;
    return (F)((I)power + ((I)shifted << 23));
}

// The largest of n values and whether any is NaN.
static float largest_of(const float* x, std::size_t n, bool& has_nan) {
    F most = splat(-__builtin_inff());
    I nan{};
    std::size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const F v = load<F>(x + i);
        most = vmax(v, most);
        nan |= v != v;
    }
    float found = maximum(most);
    has_nan = false;
    for (int k = 0; k < LANES; k++) has_nan |= nan[k] != 0;
    for (; i < n; i++) found = fmax1(x[i], found), has_nan |= x[i] != x[i];
    return found;
}

static std::size_t first_of(const float* x, std::size_t n, float wanted) {
    for (std::size_t i = 0; i < n; i++)
        if (x[i] == wanted) return i;
    return 0;
}

// Masses of values in (0, 1], zeros behind them up to a whole register, and their sum.
static float masses_of(const float* x, std::size_t n, float best, float octaves, float log2_min_p, float* mass) {
    F total{};
    for (std::size_t i = 0; i < n; i += LANES) {
        F v = splat(-__builtin_inff());
        if (i + LANES <= n) v = load<F>(x + i);
        else
            for (std::size_t k = i; k < n; k++) v[k - i] = x[k];
        const F below = rounded(v - best) * octaves;
        F m = below >= log2_min_p ? exp2_apart(below) : F{};
        if (i + LANES > n)
            for (std::size_t k = n - i; k < LANES; k++) m[k] = 0.0f;
        total = total + m;
        store_to(mass + i, m);
    }
    return sum(total);
}

// Masses as whole weights, in their place; their sum, which is below 2^32.
static std::uint32_t weights_of(float* mass, std::size_t padded, float total) {
    std::uint32_t bits;
    std::memcpy(&bits, &total, 4);
    const std::uint32_t exponent = bits >> 23; // with its bias; a sum is at least 1
    const std::uint32_t scale_bits = (127 + 30 + 127 - exponent) << 23;
    float scale;
    std::memcpy(&scale, &scale_bits, 4);
    U all{};
    for (std::size_t i = 0; i < padded; i += LANES) {
        const U weight = (U)__builtin_convertvector(rounded(load<F>(mass + i) * scale) + 0.5f, I); // below 2^31
        all += weight;
        store_to(mass + i, weight);
    }
    std::uint32_t found = 0;
    for (int k = 0; k < LANES; k++) found += all[k];
    return found;
}

static std::uint32_t sum_from(const std::uint32_t* weights, std::size_t padded, std::uint32_t least) {
    U all{};
    for (std::size_t i = 0; i < padded; i += LANES) {
        const U w = load<U>(weights + i);
        all += w >= least ? w : U{};
    }
    std::uint32_t found = 0;
    for (int k = 0; k < LANES; k++) found += all[k];
    return found;
}

static std::uint32_t needed_of(std::uint32_t total, float top_p) {
    const auto needed = std::uint32_t(float(total) * top_p);
    return max1<std::uint32_t>(min1(needed, total), 1);
}

// Zeroes weights that top-p leaves out (weighted_draw.top_p_threshold); the sum of the others. steps: each search step's factor.
static std::uint32_t cut_by_top_p(std::uint32_t* weights, std::size_t padded, std::uint32_t total, const DrawRow& row) {
    const std::uint32_t needed = needed_of(total, row.top_p);
    U largest{};
    for (std::size_t i = 0; i < padded; i += LANES) {
        const U w = load<U>(weights + i);
        largest = w > largest ? w : largest;
    }
    std::uint32_t most = 0;
    for (int k = 0; k < LANES; k++) most = max1<std::uint32_t>(most, largest[k]);
    float above = float(most) * row.steps->up;
    for (int s = 0; s < kSearchSteps; s++) {
        const float trial = above * row.steps->down[s];
        if (sum_from(weights, padded, std::uint32_t(trial)) < needed) above = trial;
    }
    const std::uint32_t bound = std::uint32_t(above * row.steps->one), least = max1<std::uint32_t>(min1(bound, most), 1);
    U all{};
    for (std::size_t i = 0; i < padded; i += LANES) {
        const U w = load<U>(weights + i), kept = w >= least ? w : U{};
        all += kept;
        store_to(weights + i, kept);
    }
    std::uint32_t left = 0;
    for (int k = 0; k < LANES; k++) left += all[k];
    return left;
}

// The place that a random number finds in the running sum.
static std::size_t find_weight(const std::uint32_t* weights, std::size_t padded, std::size_t n, std::uint32_t total, std::uint32_t number) {
    const auto target = std::uint32_t(std::uint64_t(number) * total >> 32);
    std::uint32_t running = 0;
    for (std::size_t i = 0; i < padded; i += LANES) {
        const U w = load<U>(weights + i);
        std::uint32_t all = 0;
        for (int k = 0; k < LANES; k++) all += w[k];
        if (running + all <= target) {
            running += all;
            continue;
        }
        for (int k = 0; k < LANES; k++)
            if ((running += w[k]) > target) return min1<std::size_t>(i + k, n - 1);
    }
    return n - 1;
}

// Whole numbers in the order of floats that are no NaN and no -0.
TQ_INLINE I ordered(F x) {
    const I bits = (I)x;
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// What may still be among the largest, in order of ids.
struct Candidates {
    float* values; // room for whole registers
    std::uint32_t* ids;
    int num, room;
};

// The k largest of at least k candidates, and of equals the lower ids; returns the least of them. Their order stays. Found by
// halving what lies between two numbers: as fast whatever the order, and even if all are equal.
static float keep_largest(Candidates& c, int k) {
    const int padded = (c.num + LANES - 1) / LANES * LANES;
    for (int i = c.num; i < padded; i++) c.values[i] = -__builtin_inff();
    const auto count_from = [&](std::int32_t bound) {
        I found{};
        for (int i = 0; i < padded; i += LANES) found -= (I)(ordered(load<F>(c.values + i)) >= bound);
        int all = 0;
        for (int l = 0; l < LANES; l++) all += found[l];
        return all;
    };
    std::int64_t low = INT32_MIN, high = INT32_MAX; // at least k are from `low` on, fewer than k from beyond `high` on
    while (low < high) {
        const std::int64_t middle = low + (high - low + 1) / 2;
        if (count_from(std::int32_t(middle)) >= k) low = middle;
        else high = middle - 1;
    }
    const I bits = splat(std::int32_t(low));
    const float least = ((F)(bits ^ ((bits >> 31) & 0x7FFFFFFF)))[0];
    int above = 0, kept = 0;
    for (int i = 0; i < c.num; i++) above += c.values[i] > least;
    for (int i = 0, equals = k - above; i < c.num; i++)
        if (c.values[i] > least || (c.values[i] == least && equals-- > 0)) c.values[kept] = c.values[i], c.ids[kept++] = c.ids[i];
    c.num = kept;
    return least;
}

// Falling, equals as they were; `other` has room for as many.
static void sort_falling(float* values, std::uint32_t* ids, float* other_values, std::uint32_t* other_ids, int n) {
    float *from = values, *to = other_values;
    std::uint32_t *from_ids = ids, *to_ids = other_ids;
    for (int run = 1; run < n; run *= 2) {
        for (int start = 0; start < n; start += 2 * run) {
            const int middle = min1(start + run, n), end = min1(start + 2 * run, n);
            for (int a = start, b = middle, at = start; at < end; at++) {
                const int next = b >= end || (a < middle && from[a] >= from[b]) ? a++ : b++;
                to[at] = from[next], to_ids[at] = from_ids[next];
            }
        }
        float* values_before = from;
        std::uint32_t* ids_before = from_ids;
        from = to, to = values_before, from_ids = to_ids, to_ids = ids_before;
    }
    if (from == values) return;
    std::memcpy(values, from, sizeof(float) * n);
    std::memcpy(ids, from_ids, sizeof(std::uint32_t) * n);
}

// How many candidates are kept before the lesser ones are dropped, for the k largest of n.
TQ_INLINE int candidate_room(std::size_t n, int k) { return int(min1<std::size_t>(n, max1(2 * std::size_t(k), std::size_t(256)))); }

// The k largest values and their ids: falling, and of equals the lower id first. Nothing here is NaN. `held` has room for
// candidate_room() of either. Each candidate costs about the same, whatever the order and k; rising values are all candidates.
static void largest_first(const float* x, std::size_t n, int k, float* values, std::uint32_t* ids, Candidates held) {
    float least = -__builtin_inff();
    bool is_bound = false; // from then on only what is above `least` is wanted
    const auto add = [&](std::size_t i) {
        if (is_bound && !(x[i] > least)) return;
        if (held.num == held.room) {
            least = keep_largest(held, k), is_bound = true;
            if (!(x[i] > least)) return;
        }
        held.values[held.num] = x[i] + 0.0f, held.ids[held.num++] = std::uint32_t(i); // -0 is 0
    };
    std::size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        if (is_bound && !(maximum(load<F>(x + i)) > least)) continue;
        for (std::size_t j = i; j < i + LANES; j++) add(j);
    }
    for (; i < n; i++) add(i);
    if (held.num > k) keep_largest(held, k);
    std::memcpy(values, held.values, sizeof(float) * k);
    std::memcpy(ids, held.ids, sizeof(std::uint32_t) * k);
    sort_falling(values, ids, held.values, held.ids, k);
}

// scratch of draw_scratch() floats.
static DrawnRow draw_row(const float* logits, const DrawRow& row, float* scratch) {
    const auto n = std::size_t(row.vocab_len);
    bool has_nan;
    const float best = largest_of(logits, n, has_nan);
    if (has_nan || !(best < __builtin_inff() && best > -__builtin_inff())) return {0, true};
    if (row.octaves == 0.0f) return {std::uint32_t(first_of(logits, n, best)), false};
    const bool is_ranked = row.top_k > 0;
    const auto count = is_ranked ? std::size_t(row.top_k) : n, padded = (count + LANES - 1) / LANES * LANES;
    float *mass = scratch, *values = scratch + padded;
    auto *ids = reinterpret_cast<std::uint32_t*>(values + padded), *weights = reinterpret_cast<std::uint32_t*>(mass);
    if (is_ranked) {
        float* held = values + 2 * padded;
        const int room = candidate_room(n, row.top_k);
        largest_first(logits, n, row.top_k, values, ids, {held, reinterpret_cast<std::uint32_t*>(held + (room + LANES - 1) / LANES * LANES), 0, room});
    }
    const float sum_of_masses = masses_of(is_ranked ? values : logits, count, best, row.octaves, row.log2_min_p, mass);
    std::uint32_t total = weights_of(mass, padded, sum_of_masses);
    if (row.top_p < 1.0f && is_ranked) {
        const std::uint32_t needed = needed_of(total, row.top_p);
        std::uint32_t before = 0, kept = 0;
        for (std::size_t i = 0; i < count; i++) {
            const std::uint32_t w = weights[i];
            if (before < needed) kept += w;
            else weights[i] = 0;
            before += w;
        }
        total = kept;
    } else if (row.top_p < 1.0f) {
        total = cut_by_top_p(weights, padded, total, row);
    }
    const std::size_t at = find_weight(weights, padded, count, total, row.number);
    return {is_ranked ? ids[at] : std::uint32_t(at), false};
}

static std::size_t draw_scratch(int vocab_len) { return 5 * ((std::size_t(vocab_len) + LANES - 1) / LANES * LANES); }

static const DrawTable kDraw = {draw_row, draw_scratch};
