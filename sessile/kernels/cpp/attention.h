// Attention over paged K and V: single queries in place, chunks of prompts in tiles.
//
// A slot of the pool is [kv_heads, d] of K or V; the page table says which page holds a row's tokens. P is the type of
// the pool's elements: float, or the bits of bfloat16, or int8 to be multiplied with a scale for each slot and head.

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
    float *key_scales, *value_scales;  // [slots, kv_heads], of int8
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

// The slots of the next keys of a row, times kv_heads, and of those that come next: heads [d] and scales lie there.
struct Keys {
    int count;
    int64_t places[KEY_TILE], later[KEY_TILE];
};

// Where `count` tokens of a row are; the last one again up to a whole tile.
template <class P>
static void find_keys(const Pool<P>& pool, int64_t row, int64_t start, int64_t count, int64_t* places) {
    Walk<P> walk(pool, row, start);
    for (int i = 0; i < KEY_TILE; i++) places[i] = i < count ? walk.next() * pool.kv_heads : places[i - 1];
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

INLINE void load_32(const int8_t* at, F16& first, F16& second) {
    first = load_bytes(at);
    second = load_bytes(at + 16);
}

// 32 float32 into the order in which `load_32` has elements of type P, and back.
template <class P>
INLINE void load_in_order(const float* at, F16& first, F16& second) {
    first = load(at);
    second = load(at + 16);
    if (sizeof(P) != 2) return;
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
    if (sizeof(P) != 2) {
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

// The scales of a tile of keys or values, of one head.
INLINE void read_scales(const float* scales, const int64_t* places, float* out) {
    for (int i = 0; i < KEY_TILE; i++) out[i] = scales[places[i]];
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
    alignas(64) float scores[H][KEY_TILE], scales[KEY_TILE];
    if constexpr (sizeof(P) == 1) read_scales(pool.key_scales + kv_head, at.places, scales);
    F16 parts[H][16];
    for (int base = 0; base < at.count; base += 16) {
        for (int i = 0; i < 16; i++) {
            const P* key = keys + at.places[base + i] * D;
            ask_for(keys + at.later[base + i] * D, D);
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
        for (int h = 0; h < H; h++) {
            const F16 sums = sum_each(parts[h]);
            store(scores[h] + base, sizeof(P) == 1 ? sums * load(scales + base) : sums);
        }
    }
    if constexpr (sizeof(P) == 1) read_scales(pool.value_scales + kv_head, at.places, scales);
    for (int h = 0; h < H; h++) {
        const float shrink = weigh(scores[h], at.count, scale, out.tops[h], out.totals[h]);
        for (int c = 0; c < C; c++) {
            mixed[h][c][0] = mixed[h][c][0] * splat(shrink);
            mixed[h][c][1] = mixed[h][c][1] * splat(shrink);
        }
        if constexpr (sizeof(P) == 1)
            for (int i = 0; i < at.count; i++) scores[h][i] *= scales[i];
    }
    for (int i = 0; i < at.count; i++) {
        ask_for(values + at.later[i] * D, D);
        for (int c = 0; c < C; c++) {
            F16 low, high;
            load_32(values + at.places[i] * D + c * 32, low, high);
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

#if defined(__AVX512VNNI__)
// Four times four words of 32 bits change places within each 128 bits.
INLINE void transpose_words(__m512i* x) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
}

// The sums of each x's four times 128 bits, side by side.
INLINE __m512i sum_quarters(const __m512i* x) {
    const __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(x[0], x[1], 0x88), _mm512_shuffle_i32x4(x[0], x[1], 0xDD));
    const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(x[2], x[3], 0x88), _mm512_shuffle_i32x4(x[2], x[3], 0xDD));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// Bytes of a tile of keys, or of values: vectors of 64 bytes in which those of four keys lie side by side, by words of
// four elements (keys), or by elements (values). For heads of 64 × B elements.
template <int B>
struct ByteTile {
    __m512i fours[KEY_TILE / 4][4 * B];
    float scales[KEY_TILE];  // of each key
};

// Byte i of word w of 128 bits number l is element 16 × l + 4 × e + i of key w; without sign, by 128 too much.
template <int B>
static void read_keys(const int8_t* keys, const Keys& at, ByteTile<B>& out) {
    for (int i = 0; i < KEY_TILE; i += 4) {
        for (int b = 0; b < B; b++) {
            for (int j = 0; j < 4; j++)
                out.fours[i / 4][4 * b + j] = _mm512_loadu_si512(keys + (at.places[i + j] * B + b) * 64) ^
                                              _mm512_set1_epi8((char)128);
            transpose_words(out.fours[i / 4] + 4 * b);
        }
    }
}

// Byte i of word w of 128 bits number l is element 16 × l + 4 × e + w of value i.
template <int B>
static void read_values(const int8_t* values, const Keys& at, ByteTile<B>& out) {
    for (int i = 0; i < KEY_TILE; i += 4) {
        for (int b = 0; b < B; b++) {
            const __m512i v = _mm512_loadu_si512(values + (at.places[i] * B + b) * 64);
            const __m512i w = _mm512_loadu_si512(values + (at.places[i + 1] * B + b) * 64);
            const __m512i x = _mm512_loadu_si512(values + (at.places[i + 2] * B + b) * 64);
            const __m512i y = _mm512_loadu_si512(values + (at.places[i + 3] * B + b) * 64);
            const __m512i low[2] = {_mm512_unpacklo_epi8(v, w), _mm512_unpacklo_epi8(x, y)};
            const __m512i high[2] = {_mm512_unpackhi_epi8(v, w), _mm512_unpackhi_epi8(x, y)};
            __m512i* own = out.fours[i / 4] + 4 * b;
            own[0] = _mm512_unpacklo_epi16(low[0], low[1]);
            own[1] = _mm512_unpackhi_epi16(low[0], low[1]);
            own[2] = _mm512_unpacklo_epi16(high[0], high[1]);
            own[3] = _mm512_unpackhi_epi16(high[0], high[1]);
        }
    }
}

// A query head of d elements as whole numbers of 8 bits, times a scale.
struct WholeQuery {
    float scale;
    int32_t zero;  // what 128 too much in each element of a key comes to
    int8_t elements[];

    static int64_t bytes(int64_t d) { return (int64_t)sizeof(WholeQuery) + d; }

    void set(const float* query, int64_t d) {
        F16 most = splat(0);
        for (int64_t i = 0; i < d; i += 16)
            most = maximum(most, maximum(load(query + i), splat(0) - load(query + i)));
        const float top = largest(most), factor = top > 0 ? 127 / top : 0;
        __m512i total = _mm512_setzero_si512();
        for (int64_t i = 0; i < d; i += 16) {
            const __m512i whole = _mm512_cvtps_epi32((__m512)(load(query + i) * splat(factor)).part[0]);
            total = _mm512_add_epi32(total, whole);
            _mm_storeu_si128((__m128i*)(elements + i), _mm512_cvtepi32_epi8(whole));
        }
        scale = top / 127;
        zero = 128 * _mm512_reduce_add_epi32(total);
    }
};

// Each word of 128 bits four times, as `read_keys` has those of four keys.
INLINE void spread(const int8_t* at, __m512i* out) {
    const __m512i x = _mm512_loadu_si512(at);
    out[0] = _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0x00);
    out[1] = _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0x55);
    out[2] = _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0xAA);
    out[3] = _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0xFF);
}

// A share of the heads that come next, to be asked for little by little beside the products of a tile.
template <int B>
struct Later {
    const int8_t* heads;
    const int64_t* places;
    int count;

    void ask(int four) const {
        constexpr int FOURS = KEY_TILE / 4;
        for (int i = count * four / FOURS; i < count * (four + 1) / FOURS; i++)
            ask_for(heads + places[i] * B * 64, B * 64);
    }
};

// Scores [KEY_TILE] of a query head, not yet times the scale of a softmax.
template <int B>
static void score_bytes(const ByteTile<B>& keys, const Later<B>& later, const WholeQuery& query, float* scores) {
    __m512i words[4 * B], dots[KEY_TILE / 4];
    for (int b = 0; b < B; b++) spread(query.elements + b * 64, words + 4 * b);
    for (int four = 0; four < KEY_TILE / 4; four++) {
        later.ask(four);
        dots[four] = _mm512_setzero_si512();
        for (int i = 0; i < 4 * B; i++) dots[four] = _mm512_dpbusd_epi32(dots[four], keys.fours[four][i], words[i]);
    }
    for (int i = 0; i < KEY_TILE; i += 16) {
        F16 sums;
        sums.part[0] = (Floats)_mm512_cvtepi32_ps(
            _mm512_sub_epi32(sum_quarters(dots + i / 4), _mm512_set1_epi32(query.zero)));
        store(scores + i, sums * load(keys.scales + i) * splat(query.scale));
    }
}

// Weights float32[KEY_TILE] as whole numbers of 8 bits, the largest 255. Returns their scale.
INLINE float whole_weights(const float* weights, uint8_t* out) {
    F16 most = splat(0), poison = splat(0);  // as of `store_head`
    for (int i = 0; i < KEY_TILE; i += 16) {
        most = maximum(load(weights + i), most);
        poison = multiply_add(load(weights + i), splat(0), poison);
    }
    const float top = largest(most), factor = top > 0 ? 255 / top : 0;
    for (int i = 0; i < KEY_TILE; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32((__m512)(load(weights + i) * splat(factor)).part[0]);
        _mm_store_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(whole));
    }
    return top / 255 + sum(poison);
}

// Four times 16 numbers in the order of `read_values` → in the order of elements.
INLINE void straighten(const __m512i* x, __m512i* out) {
    const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[0], x[1], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(x[2], x[3], 0x44), d = _mm512_shuffle_i32x4(x[2], x[3], 0xEE);
    out[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    out[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
    out[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    out[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

// weights [KEY_TILE] times values, added to mixed [64 × B]. Sums of a tile are exact.
template <int B>
static void mix_bytes(const ByteTile<B>& values, const Later<B>& later, const float* weights, float* mixed) {
    alignas(64) uint8_t whole[KEY_TILE];
    const float scale = whole_weights(weights, whole);
    for (int b = 0; b < B; b++) {
        __m512i totals[4], ordered[4];
        for (int e = 0; e < 4; e++) totals[e] = _mm512_setzero_si512();
        for (int four = 0; four < KEY_TILE / 4; four++) {
            if (b == 0) later.ask(four);
            const __m512i weight = (__m512i)splat_word(whole + 4 * four).part[0];
            for (int e = 0; e < 4; e++)
                totals[e] = _mm512_dpbusd_epi32(totals[e], weight, values.fours[four][4 * b + e]);
        }
        straighten(totals, ordered);
        for (int e = 0; e < 4; e++) {
            float* own = mixed + b * 64 + e * 16;
            F16 sums;
            sums.part[0] = (Floats)_mm512_cvtepi32_ps(ordered[e]);
            store(own, multiply_add(sums, splat(scale), load(own)));
        }
    }
}

// `group` query heads of 64 × B that share a KV head, over a pool of int8, whose bytes are multiplied with whole numbers.
template <int B>
static void attend_bytes(
    const Pool<int8_t>& pool, const Keys& at, int64_t kv_head, int64_t group, const uint8_t* whole, Partials out) {
    constexpr int D = B * 64;
    const float scale = LOG2_E / __builtin_sqrtf((float)D);
    ByteTile<B> keys, values;
    read_keys<B>(pool.keys + kv_head * D, at, keys);
    read_values<B>(pool.values + kv_head * D, at, values);
    read_scales(pool.key_scales + kv_head, at.places, keys.scales);
    read_scales(pool.value_scales + kv_head, at.places, values.scales);
    for (int64_t h = 0; h < group; h++) {
        alignas(64) float scores[KEY_TILE];
        const Partials own = out.from(h, D);
        const int64_t first = KEY_TILE * h / group, share = KEY_TILE * (h + 1) / group - first;
        const Later<B> later{pool.keys + kv_head * D, at.later + first, (int)share};
        score_bytes<B>(keys, later, *(const WholeQuery*)(whole + h * WholeQuery::bytes(D)), scores);
        for (int i = at.count; i < KEY_TILE; i++) scores[i] = LOWEST;
        const float shrink = weigh(scores, KEY_TILE, scale, *own.tops, *own.totals);
        for (int i = 0; i < KEY_TILE; i += 16) store(scores + i, load(scores + i) * load(values.scales + i));
        for (int i = 0; shrink != 1.0f && i < D; i += 16) store(own.mixed + i, load(own.mixed + i) * splat(shrink));
        mix_bytes<B>(values, {pool.values + kv_head * D, at.later + first, (int)share}, scores, own.mixed);
    }
}
#endif

INLINE float as_float(float x) { return x; }
INLINE float as_float(int8_t x) { return x; }
INLINE float as_float(uint16_t x) { return widen(x); }

// The same for one head of any size.
template <class P>
static void attend_any(const Pool<P>& pool, const Keys& at, int64_t kv_head, const float* query, Partials out) {
    const float scale = LOG2_E / __builtin_sqrtf((float)pool.d);
    const P *keys = pool.keys + kv_head * pool.d, *values = pool.values + kv_head * pool.d;
    alignas(64) float scores[KEY_TILE];
    for (int i = 0; i < at.count; i++) {
        const P* key = keys + at.places[i] * pool.d;
        scores[i] = 0;
        for (int64_t j = 0; j < pool.d; j++) scores[i] += query[j] * as_float(key[j]);
        if constexpr (sizeof(P) == 1) scores[i] *= pool.key_scales[at.places[i] + kv_head];
    }
    const float shrink = weigh(scores, at.count, scale, *out.tops, *out.totals);
    for (int64_t j = 0; j < pool.d; j++) out.mixed[j] *= shrink;
    for (int i = 0; i < at.count; i++) {
        if constexpr (sizeof(P) == 1) scores[i] *= pool.value_scales[at.places[i] + kv_head];
        for (int64_t j = 0; j < pool.d; j++) out.mixed[j] += scores[i] * as_float(values[at.places[i] * pool.d + j]);
    }
}

// What `attend_keys` needs of query heads beside them: nothing, or each as whole numbers.
template <class P>
struct WholeQueries {
#if defined(__AVX512VNNI__)
    static constexpr bool are_used(int64_t d) { return sizeof(P) == 1 && (d == 64 || d == 128); }
    static int64_t bytes(int64_t heads, int64_t d) { return heads * WholeQuery::bytes(d); }

    static void set(const float* query, int64_t heads, int64_t d, uint8_t* out) {
        if (!are_used(d)) return;
        for (int64_t h = 0; h < heads; h++) ((WholeQuery*)(out + h * WholeQuery::bytes(d)))->set(query + h * d, d);
    }
#else
    static int64_t bytes(int64_t, int64_t) { return 0; }
    static void set(const float*, int64_t, int64_t, uint8_t*) {}
#endif
};

// The query heads [group, d] that share a KV head, and keys.
template <class P>
static void attend_keys(
    const Pool<P>& pool, const Keys& at, int64_t kv_head, int64_t group, const float* query, const uint8_t* whole,
    Partials out) {
#if defined(__AVX512VNNI__)
    if constexpr (sizeof(P) == 1) {
        if (WholeQueries<P>::are_used(pool.d)) {
            whole += kv_head * WholeQueries<P>::bytes(group, pool.d);
            if (pool.d == 64) return attend_bytes<1>(pool, at, kv_head, group, whole, out);
            return attend_bytes<2>(pool, at, kv_head, group, whole, out);
        }
    }
#endif
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

INLINE void store_as(float* at, F16 x) { store(at, x); }
INLINE void store_as(uint16_t* at, F16 x) { store_bfloat16(at, x); }

// A head of d elements into the pool; in int8 scaled so that the largest becomes 127.
template <class P>
INLINE void store_head(const float* x, int64_t d, P* out, float*) {
    for (int64_t i = 0; i < d; i++) convert(x[i], out[i]);
}

INLINE void store_head(const float* x, int64_t d, int8_t* out, float* scale) {
    float most = 0, poison = 0;  // NaN if anything is not finite: else int8 would hide it
    for (int64_t i = 0; i < d; i++) {
        most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
        poison += x[i] * 0;
    }
    const float factor = most > 0 ? 127 / most : 0;
    *scale = most / 127 + poison;
    for (int64_t i = 0; i < d; i++) out[i] = (int8_t)__builtin_lrintf(x[i] * factor);
}

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

// Where heads lie, count of them → packed; of the rest of a tile nothing has any weight.
template <class P, class X>
static void pack_heads(
    const P* const* key, const P* const* value, int count, int64_t d, int64_t d_padded, X* keys, X* values) {
    const X zero = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(P) == 2 && sizeof(X) == 2) {
        if (count == KEY_TILE && d % 16 == 0) return pack_whole_tile(key, value, d, keys, values);
    }
#endif
    for (int block = 0; block < UNIT_BLOCKS; block++)
        for (int lane = 0; lane < 16; lane++) {
            const int i = block * 16 + lane;
            for (int64_t pair = 0; pair < d / 2; pair++) {
                X even = zero, odd = zero;
                if (i < count) convert(key[i][2 * pair], even), convert(key[i][2 * pair + 1], odd);
                put(keys + block * 16 * d, pair, lane, even, odd);
            }
        }
    for (int64_t block = 0; block < d_padded / 16; block++)
        for (int pair = 0; pair < KEY_TILE / 2; pair++)
            for (int lane = 0; lane < 16; lane++) {
                const int64_t j = block * 16 + lane;
                X even = zero, odd = zero;
                if (j < d && 2 * pair < count) convert(value[2 * pair][j], even);
                if (j < d && 2 * pair + 1 < count) convert(value[2 * pair + 1][j], odd);
                put(values + block * 16 * KEY_TILE, pair, lane, even, odd);
            }
}

// d bytes as numbers.
template <class X>
static void widen_head(const int8_t* head, float scale, int64_t d, X* out) {
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) store_as(out + i, load_bytes(head + i) * splat(scale));
    for (; i < d; i++) convert((float)head[i] * scale, out[i]);
}

// A tile of keys and values of a KV head → packed. widened [2 × KEY_TILE, d]: scratch for pools of int8.
template <class P, class X>
static void pack_tile(
    const Pool<P>& pool, int64_t row, int64_t kv_head, int64_t start, int64_t end, int64_t d_padded, X* widened,
    X* keys, X* values) {
    const int count = (int)(end - start < KEY_TILE ? end - start : KEY_TILE);
    int64_t places[KEY_TILE];
    find_keys(pool, row, start, count, places);
    if constexpr (sizeof(P) == 1) {
        const X *key[KEY_TILE], *value[KEY_TILE];
        for (int i = 0; i < count; i++) {
            const int64_t place = places[i] + kv_head;
            X *own_key = widened + i * pool.d, *own_value = own_key + KEY_TILE * pool.d;
            widen_head(pool.keys + place * pool.d, pool.key_scales[place], pool.d, own_key);
            widen_head(pool.values + place * pool.d, pool.value_scales[place], pool.d, own_value);
            key[i] = own_key;
            value[i] = own_value;
        }
        pack_heads(key, value, count, pool.d, d_padded, keys, values);
    } else {
        const P *key[KEY_TILE], *value[KEY_TILE];
        for (int i = 0; i < count; i++) {
            key[i] = pool.keys + (places[i] + kv_head) * pool.d;
            value[i] = pool.values + (places[i] + kv_head) * pool.d;
        }
        pack_heads(key, value, count, pool.d, d_padded, keys, values);
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
