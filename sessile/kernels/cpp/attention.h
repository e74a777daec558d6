// Attention over paged K and V: single queries in place, chunks of prompts in tiles.
//
// A slot of the pool is [kv_heads, d] of K or V; the page table says which page holds a row's tokens. P is the type of
// the pool's elements: float, or the bits of bfloat16.

#pragma once

#include "linear.h"

constexpr float LOWEST = -1e30f;  // below every score; not infinite, as infinities have no difference
constexpr int KEY_TILE = 64;  // keys whose scores are taken together
constexpr int QUERY_TILE = 16;  // positions of a chunk that are attended together
#if defined(__AVX512F__)
constexpr float SLACK = 8;  // by how many powers of two a weight may exceed 1 before all that was summed is shrunk
#else
constexpr float SLACK = 0;
#endif

template <class P>
struct Pool {
    P *keys, *values;
    const int32_t* table;
    int64_t row_pages, page_size, kv_heads, d;

};

// Walks over the slots of a row, one position after the other: a division for each would cost more than its product.
template <class P>
class Walk {
  public:
    Walk(const Pool<P>& pool, int64_t row, int64_t position)
        : page_(pool.table + row * pool.row_pages + position / pool.page_size), size_(pool.page_size),
          within_(position % pool.page_size) {}

    int64_t next() {
        const int64_t slot = *page_ * size_ + within_;
        if (++within_ == size_) within_ = 0, page_++;
        return slot;
    }

  private:
    const int32_t* page_;
    int64_t size_, within_;
};

// The next keys of a row, for all heads: where they are in the pool, for KV head 0, and where those are that come next.
struct Keys {
    int count;
    int64_t places[KEY_TILE], later[KEY_TILE];
};

// Where `count` tokens of a row are; the last one again up to a whole tile.
template <class P>
static void find_keys(const Pool<P>& pool, int64_t row, int64_t start, int64_t count, int64_t* places) {
    Walk<P> walk(pool, row, start);
    for (int i = 0; i < KEY_TILE; i++) places[i] = i < count ? walk.next() * pool.kv_heads * pool.d : places[i - 1];
}

// What keys say to the heads of a query, so far: the largest score times log2 e, the sum of exponentials, and the
// values [d] weighted by them, not yet divided.
struct Partials {
    float *tops, *totals, *mixed;

    Partials from(int64_t head, int64_t d) const { return {tops + head, totals + head, mixed + head * d}; }
};

// 32 elements as two times 16, in an order that is the same for all.
INLINE void load_32(const float* at, F16& first, F16& second) {
    first = load(at);
    second = load(at + 16);
}

INLINE void load_32(const uint16_t* at, F16& first, F16& second) {
    const W16 words = load_words(at);
    first = low_halves(words);
    second = high_halves(words);
}

// 32 float32 into the order in which `load_32` has elements of type P, and back.
template <class P>
INLINE void load_in_order(const float* at, F16& first, F16& second) {
    first = load(at);
    second = load(at + 16);
    if (sizeof(P) == 4) return;
#if defined(__AVX512F__)
    const __m512 a = (__m512)first.part[0], b = (__m512)second.part[0];
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    first.part[0] = (Floats)_mm512_permutex2var_ps(a, even, b);
    second.part[0] = (Floats)_mm512_permutex2var_ps(a, even | _mm512_set1_epi32(1), b);
#else
    float order[32];
    for (int i = 0; i < 32; i++) order[i % 2 * 16 + i / 2] = at[i];
    first = load(order);
    second = load(order + 16);
#endif
}

template <class P>
INLINE void store_in_order(float* at, F16 first, F16 second) {
    if (sizeof(P) == 4) {
        store(at, first);
        store(at + 16, second);
        return;
    }
#if defined(__AVX512F__)
    const __m512 a = (__m512)first.part[0], b = (__m512)second.part[0];
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_ps(at, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(at + 16, _mm512_permutex2var_ps(a, low + _mm512_set1_epi64(8LL << 32 | 8), b));
#else
    float order[32];
    store(order, first);
    store(order + 16, second);
    for (int i = 0; i < 32; i++) at[i] = order[i % 2 * 16 + i / 2];
#endif
}

// out[i] = the sum of the lanes of x[i].
INLINE F16 sum_each(const F16* x) {
#if defined(__AVX512F__)
    __m512 t[8], u[4], w[2];
    for (int i = 0; i < 8; i++) {
        const __m512 a = (__m512)x[2 * i].part[0], b = (__m512)x[2 * i + 1].part[0];
        t[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        u[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    for (int i = 0; i < 2; i++)
        w[i] = _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xDD);
    F16 out;
    out.part[0] = (Floats)(_mm512_shuffle_f32x4(w[0], w[1], 0x88) + _mm512_shuffle_f32x4(w[0], w[1], 0xDD));
    return out;
#else
    float lane[16];
    for (int i = 0; i < 16; i++) lane[i] = sum(x[i]);
    return load(lane);
#endif
}

// scores [KEY_TILE], of which count are meant and a multiple of 16 is there → weights, against a new running maximum.
// scale: of scores, times log2 e. Returns by how much what was summed before shrinks.
INLINE float weigh(float* scores, int count, float scale, float& top, float& total) {
    const int padded = (count + 15) / 16 * 16;
    for (int i = count; i < padded; i++) scores[i] = LOWEST;
    F16 most = splat(LOWEST);
    for (int i = 0; i < padded; i += 16) most = maximum(load(scores + i), most);
    const float own_top = largest(most) * scale;
    const float new_top = own_top > top ? own_top : top;
    const float shrink = new_top == top ? 1.0f : power_of_two(splat(top - new_top)).part[0][0];
    F16 sums = splat(0);
    for (int i = 0; i < padded; i += 16) {
        const F16 weight = power_of_two(multiply_add(load(scores + i), splat(scale), splat(-new_top)));
        store(scores + i, weight);
        sums = sums + weight;
    }
    total = total * shrink + sum(sums);
    top = new_top;
    return shrink;
}

// Have the lines of d elements brought to the second cache.
template <class P>
INLINE void ask_for(const P* at, int d) {
    for (int byte = 0; byte < d * (int)sizeof(P); byte += 64) __builtin_prefetch((const char*)at + byte, 0, 2);
}

// H heads of one query and keys, for heads of 32 × C elements. What comes next is asked for one key at a time: asked
// for all at once, most of it would be dropped, and pages lie anywhere, so that no processor foresees them.
template <class P, int C, int H>
static void attend_vectors(const Pool<P>& pool, const Keys& at, int64_t kv_head, const float* query, Partials out) {
    constexpr int D = C * 32;
    const float scale = LOG2_E / __builtin_sqrtf((float)D);
    const P *keys = pool.keys + kv_head * D, *values = pool.values + kv_head * D;
    F16 q[H][C][2], mixed[H][C][2];
    for (int h = 0; h < H; h++)
        for (int c = 0; c < C; c++) {
            load_in_order<P>(query + h * D + c * 32, q[h][c][0], q[h][c][1]);
            load_in_order<P>(out.mixed + h * D + c * 32, mixed[h][c][0], mixed[h][c][1]);
        }
    alignas(64) float scores[H][KEY_TILE];
    F16 parts[H][16];
    for (int base = 0; base < at.count; base += 16) {
        for (int i = 0; i < 16; i++) {
            const P* key = keys + at.places[base + i];
            ask_for(keys + at.later[base + i], D);
            F16 dot[H];
            for (int h = 0; h < H; h++) dot[h] = splat(0);
            for (int c = 0; c < C; c++) {
                F16 low, high;
                load_32(key + c * 32, low, high);
                for (int h = 0; h < H; h++) {
                    dot[h] = multiply_add(q[h][c][0], low, dot[h]);
                    dot[h] = multiply_add(q[h][c][1], high, dot[h]);
                }
            }
            for (int h = 0; h < H; h++) parts[h][i] = dot[h];
        }
        for (int h = 0; h < H; h++) store(scores[h] + base, sum_each(parts[h]));
    }
    for (int h = 0; h < H; h++) {
        const float shrink = weigh(scores[h], at.count, scale, out.tops[h], out.totals[h]);
        for (int c = 0; c < C; c++) {
            mixed[h][c][0] = mixed[h][c][0] * splat(shrink);
            mixed[h][c][1] = mixed[h][c][1] * splat(shrink);
        }
    }
    for (int i = 0; i < at.count; i++) {
        ask_for(values + at.later[i], D);
        for (int c = 0; c < C; c++) {
            F16 low, high;
            load_32(values + at.places[i] + c * 32, low, high);
            for (int h = 0; h < H; h++) {
                const F16 weight = splat(scores[h][i]);
                mixed[h][c][0] = multiply_add(weight, low, mixed[h][c][0]);
                mixed[h][c][1] = multiply_add(weight, high, mixed[h][c][1]);
            }
        }
    }
    for (int h = 0; h < H; h++)
        for (int c = 0; c < C; c++) store_in_order<P>(out.mixed + h * D + c * 32, mixed[h][c][0], mixed[h][c][1]);
}

INLINE float as_float(float x) { return x; }
INLINE float as_float(uint16_t x) { return widen(x); }

// The same for one head of any size.
template <class P>
static void attend_any(const Pool<P>& pool, const Keys& at, int64_t kv_head, const float* query, Partials out) {
    const float scale = LOG2_E / __builtin_sqrtf((float)pool.d);
    const P *keys = pool.keys + kv_head * pool.d, *values = pool.values + kv_head * pool.d;
    alignas(64) float scores[KEY_TILE];
    for (int i = 0; i < at.count; i++) {
        const P* key = keys + at.places[i];
        scores[i] = 0;
        for (int64_t j = 0; j < pool.d; j++) scores[i] += query[j] * as_float(key[j]);
    }
    const float shrink = weigh(scores, at.count, scale, *out.tops, *out.totals);
    for (int64_t j = 0; j < pool.d; j++) out.mixed[j] *= shrink;
    for (int i = 0; i < at.count; i++)
        for (int64_t j = 0; j < pool.d; j++) out.mixed[j] += scores[i] * as_float(values[at.places[i] + j]);
}

// The query heads [group, d] that share a KV head, and keys.
template <class P>
static void attend_keys(
    const Pool<P>& pool, const Keys& at, int64_t kv_head, int64_t group, const float* query, Partials out) {
#define ATTEND(C, H)                                                                             \
    if (pool.d == C * 32 && group - h >= H) {                                                    \
        attend_vectors<P, C, H>(pool, at, kv_head, query + h * pool.d, out.from(h, pool.d));     \
        h += H;                                                                                  \
        continue;                                                                                \
    }
    for (int64_t h = 0; h < group;) {
        ATTEND(2, 4) ATTEND(2, 3) ATTEND(2, 2) ATTEND(2, 1) ATTEND(4, 2) ATTEND(4, 1) ATTEND(1, 4) ATTEND(1, 1)
        attend_any(pool, at, kv_head, query + h * pool.d, out.from(h, pool.d));
        h++;
    }
#undef ATTEND
}

// A chunk's keys and values as packed weights, X being the type in which they are multiplied: a tile of keys is four
// blocks of 16 keys over d, one of values blocks of 16 elements over 64 keys.
template <class X>
INLINE void put(X* out, int64_t pair, int lane, X even, X odd) {
    if (sizeof(X) == 2) {
        out[pair * 32 + 2 * lane] = even;
        out[pair * 32 + 2 * lane + 1] = odd;
    } else {
        out[pair * 32 + lane] = even;
        out[pair * 32 + 16 + lane] = odd;
    }
}

INLINE void convert(float x, float& out) { out = x; }
INLINE void convert(uint16_t x, float& out) { out = widen(x); }
INLINE void convert(uint16_t x, uint16_t& out) { out = x; }
INLINE void convert(float x, uint16_t& out) { out = narrow(x); }

#if defined(__AVX512F__)
// `pack_tile` where all 64 keys are there, in bfloat16 as they are: keys by words, values two rows at once.
static void pack_whole_tile(
    const uint16_t* const* key, const uint16_t* const* value, int64_t d, uint16_t* keys, uint16_t* values) {
    for (int block = 0; block < UNIT_BLOCKS; block++) {
        uint16_t* out = keys + block * 16 * d;
        for (int64_t pair = 0; pair < d / 2; pair++)
            for (int lane = 0; lane < 16; lane++)
                memcpy(out + (pair * 16 + lane) * 2, key[block * 16 + lane] + 2 * pair, 4);
    }
    for (int64_t j = 0; j < d; j += 16)
        for (int pair = 0; pair < KEY_TILE / 2; pair++) {
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value[2 * pair] + j)));
            const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value[2 * pair + 1] + j)));
            _mm512_storeu_si512(values + j * KEY_TILE + pair * 32, even | _mm512_slli_epi32(odd, 16));
        }
}
#endif

template <class P, class X>
static void pack_tile(
    const Pool<P>& pool, int64_t row, int64_t kv_head, int64_t start, int64_t end, int64_t d_padded, X* keys,
    X* values) {
    const P *key[KEY_TILE], *value[KEY_TILE];
    const int count = (int)(end - start < KEY_TILE ? end - start : KEY_TILE);
    Walk<P> walk(pool, row, start);
    for (int i = 0; i < count; i++) {
        const int64_t place = (walk.next() * pool.kv_heads + kv_head) * pool.d;
        key[i] = pool.keys + place;
        value[i] = pool.values + place;
    }
    const X zero = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(P) == 2 && sizeof(X) == 2) {
        if (count == KEY_TILE && pool.d % 16 == 0) return pack_whole_tile(key, value, pool.d, keys, values);
    }
#endif
    for (int block = 0; block < UNIT_BLOCKS; block++)
        for (int lane = 0; lane < 16; lane++) {
            const int i = block * 16 + lane;
            for (int64_t pair = 0; pair < pool.d / 2; pair++) {
                X even = zero, odd = zero;
                if (i < count) convert(key[i][2 * pair], even), convert(key[i][2 * pair + 1], odd);
                put(keys + block * 16 * pool.d, pair, lane, even, odd);
            }
        }
    for (int64_t block = 0; block < d_padded / 16; block++)
        for (int pair = 0; pair < KEY_TILE / 2; pair++)
            for (int lane = 0; lane < 16; lane++) {
                const int64_t j = block * 16 + lane;
                X even = zero, odd = zero;
                if (j < pool.d && 2 * pair < count) convert(value[2 * pair][j], even);
                if (j < pool.d && 2 * pair + 1 < count) convert(value[2 * pair + 1][j], odd);
                put(values + block * 16 * KEY_TILE, pair, lane, even, odd);
            }
}

// What a tile of a chunk's queries keeps while it goes over the history of a KV head.
template <class X>
struct TileScratch {
    X* query;  // tiles of inputs, of d
    float* mixed;  // [d / 64, rounded up][vectors][64]
    float* totals;  // [vectors, 16], one for each lane, to be added up at the end
    float* tops;  // [vectors]

    static int64_t mixed_units(int64_t d) { return (d + UNIT_ROWS - 1) / UNIT_ROWS; }

    static int64_t bytes(int64_t vectors, int64_t d) {
        return vectors * (d * (int64_t)sizeof(X) + mixed_units(d) * UNIT_ROWS * 4 + 68) + 256;
    }

    TileScratch(uint8_t* at, int64_t vectors, int64_t d) {
        mixed = (float*)at;
        totals = mixed + mixed_units(d) * vectors * UNIT_ROWS;
        tops = totals + vectors * 16;
        query = (X*)(tops + vectors);
    }
};

INLINE void store_as(float* at, F16 x) { store(at, x); }
INLINE void store_as(uint16_t* at, F16 x) { store_bfloat16(at, x); }

INLINE F16 weights_of(F16 x, float) { return power_of_two(x); }
INLINE F16 weights_of(F16 x, uint16_t) { return roughly_power_of_two(x); }

// `weigh` for a whole tile of keys, of which the first `seen` are visible: scores float32[64] → weights [64]. The top
// is raised only when a score is above it by more than SLACK. Returns by how much what was summed before shrinks.
template <class X>
INLINE float weigh_tile(float* scores, int seen, float scale, float& top, float* totals, X* weights) {
    for (int i = seen; i < KEY_TILE; i++) scores[i] = LOWEST;
    F16 row[KEY_TILE / 16];
    for (int i = 0; i < KEY_TILE / 16; i++) row[i] = multiply_add(load(scores + i * 16), splat(scale), splat(-top));
    F16 before = load(totals);
    float shrink = 1;
    if (__builtin_expect(any_above(maximum(maximum(row[0], row[1]), maximum(row[2], row[3])), SLACK), 0)) {
        for (int i = 0; i < KEY_TILE / 16; i++) row[i] = load(scores + i * 16);
        const float new_top = largest(maximum(maximum(row[0], row[1]), maximum(row[2], row[3]))) * scale;
        for (int i = 0; i < KEY_TILE / 16; i++) row[i] = multiply_add(row[i], splat(scale), splat(-new_top));
        shrink = power_of_two(splat(top - new_top)).part[0][0];
        before = before * splat(shrink);
        top = new_top;
    }
    for (int i = 0; i < KEY_TILE / 16; i++) {
        row[i] = weights_of(row[i], X());
        store_as(weights + i * 16, row[i]);
    }
    store(totals, before + ((row[0] + row[1]) + (row[2] + row[3])));
    return shrink;
}

// query and out [positions, group, d] at strides of positions. position: of the first query in its sequence.
template <class X>
static void attend_tile(
    const float* query, int64_t query_stride, float* out, int64_t out_stride, int64_t positions, int64_t group,
    int64_t d, int64_t d_padded, int64_t position, const X* keys, const X* values, uint8_t* scratch_bytes) {
    const int64_t vectors = positions * group;
    const float scale = LOG2_E / __builtin_sqrtf((float)d);
    TileScratch<X> scratch(scratch_bytes, vectors, d);
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t first = v / TILE_TOKENS * TILE_TOKENS;
        const int64_t count = vectors - first < TILE_TOKENS ? vectors - first : TILE_TOKENS;
        const float* own = query + v / group * query_stride + v % group * d;
        X* out_tile = scratch.query + first * d;
        int64_t i = 0;
        for (; i + 16 <= d; i += 16) {
            alignas(64) X part[16];
            store_as(part, load(own + i));
            for (int j = 0; j < 16; j++) out_tile[Inputs<X>::place(i + j, v - first, count)] = part[j];
        }
        for (; i < d; i++) convert(own[i], out_tile[Inputs<X>::place(i, v - first, count)]);
        scratch.tops[v] = -3.0e38f;
        store(scratch.totals + v * 16, splat(0));
    }
    const int64_t units = scratch.mixed_units(d), d_blocks = d_padded / 16;
    memset(scratch.mixed, 0, units * vectors * UNIT_ROWS * 4);
    alignas(64) float scores[TILE_TOKENS * KEY_TILE];
    alignas(64) X weights[TILE_TOKENS * KEY_TILE];
    constexpr int KIND = sizeof(X) == 2 ? BFLOAT16 : FLOAT32;
    for (int64_t start = 0; start < position + positions; start += KEY_TILE) {
        const uint8_t* key_blocks[UNIT_BLOCKS];
        for (int r = 0; r < UNIT_BLOCKS; r++) key_blocks[r] = (const uint8_t*)(keys + start * d + r * 16 * d);
        for (int64_t first = 0; first < vectors; first += TILE_TOKENS) {
            const int count = (int)(vectors - first < TILE_TOKENS ? vectors - first : TILE_TOKENS);
            if (start > position + (first + count - 1) / group) continue;
            tile_of<KIND, UNIT_BLOCKS>(count, Inputs<X>{scratch.query + first * d, nullptr, d}, key_blocks, 0, scores);
            for (int t = 0; t < count; t++) {
                const int64_t visible = position + (first + t) / group + 1 - start;
                const int seen = visible < 0 ? 0 : visible < KEY_TILE ? (int)visible : KEY_TILE;
                const float shrink = weigh_tile(scores + t * KEY_TILE, seen, scale, scratch.tops[first + t],
                                                scratch.totals + (first + t) * 16, weights + t * KEY_TILE);
                if (shrink == 1.0f) continue;
                for (int64_t unit = 0; unit < units; unit++)
                    for (int r = 0; r < UNIT_BLOCKS; r++) {
                        float* mixed = scratch.mixed + (unit * vectors + first + t) * UNIT_ROWS + r * 16;
                        store(mixed, load(mixed) * splat(shrink));
                    }
            }
            for (int64_t unit = 0; unit < units; unit++) {
                const uint8_t* value_blocks[UNIT_BLOCKS];
                for (int r = 0; r < UNIT_BLOCKS; r++) {
                    const int64_t block = unit * UNIT_BLOCKS + r, own = block < d_blocks ? block : d_blocks - 1;
                    value_blocks[r] = (const uint8_t*)(values + start * d_padded + own * 16 * KEY_TILE);
                }
                tile_of<KIND, UNIT_BLOCKS, true>(count, Inputs<X>{weights, nullptr, KEY_TILE}, value_blocks, 0,
                                                 scratch.mixed + (unit * vectors + first) * UNIT_ROWS);
            }
        }
    }
    for (int64_t v = 0; v < vectors; v++) {
        const float total = sum(load(scratch.totals + v * 16));
        float* own = out + v / group * out_stride + v % group * d;
        for (int64_t unit = 0; unit < units; unit++) {
            const float* mixed = scratch.mixed + (unit * vectors + v) * UNIT_ROWS;
            const int64_t start = unit * UNIT_ROWS, count = d - start < UNIT_ROWS ? d - start : UNIT_ROWS;
            int64_t i = 0;
            for (; i + 16 <= count; i += 16) store(own + start + i, load(mixed + i) / splat(total));
            for (; i < count; i++) own[start + i] = mixed[i] / total;
        }
    }
}
