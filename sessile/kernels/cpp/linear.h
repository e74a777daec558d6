// Products of a few or many tokens with packed weights.
//
// Weights lie in blocks of 16 rows, so that a lane is a row and every output is one sum over k, taken in one order
// whatever the number of tokens: an output does not depend on who else is in the batch. A pair is two neighbouring k of
// the 16 rows, a group 32 k. Packed by `packing.py`:
//
//   FLOAT32   a pair is [2][16] float32
//   BFLOAT16  a pair is [16][2] bfloat16
//   NIBBLES   a group is 4 × 64 bytes, then 16 scales and 16 minima in float16. Word [16][2] of 16 bits number c holds
//             pairs 4c … 4c + 3, lowest bits first: weight = scale × nibble + minimum
//   BYTES     a group is 8 × 64 bytes, then 16 scales in float16. Of every eight k, [16][4] int8 holds k 0, 4, 1, 5 and
//             the next one 2, 6, 3, 7: the order in which masked nibbles come
//
// With many tokens a unit of weights is unpacked once, to float32 or bfloat16 as the inputs are. To float32 that is
// exact; bfloat16 rounds what fewer tokens, whose groups are summed before they are scaled, take as it is. Inputs in
// int8 never need that: nibbles and bytes are multiplied as they lie, and sums of groups are exact integers.

#pragma once

#include "vector.h"

enum Kind { FLOAT32, BFLOAT16, NIBBLES, BYTES };

constexpr int GROUP = 32, UNIT_BLOCKS = 4, UNIT_ROWS = 64;  // a unit of work has four blocks, or two near the end

#if defined(__AVX512F__)
constexpr int FEW = 12, TILE_TOKENS = 6;
#else
constexpr int FEW = 4, TILE_TOKENS = 4;
#endif

// Of so many blocks of rows, how many a tile of so many tokens takes at once: as many sums as there are registers.
constexpr int tile_blocks(int blocks, int tokens) {
#if defined(__AVX512F__)
    return blocks == 4 && tokens <= 6 ? 4 : 2;
#else
    return tokens == 1 ? blocks : tokens == 2 ? 2 : 1;
#endif
}

INLINE int64_t block_bytes(int kind, int64_t k) {
    switch (kind) {
        case FLOAT32: return k * 64;
        case BFLOAT16: return k * 32;
        case NIBBLES: return k / GROUP * 320;
        default: return k / GROUP * 544;
    }
}

// How so many tokens are cut into tiles of about equal size: one of a single token costs as much as one of several.
template <class X>
struct Tiles {
    int64_t tokens, count;

    explicit Tiles(int64_t tokens)
        : tokens(tokens),
          count(tokens <= (sizeof(X) == 1 ? TILE_TOKENS : FEW) ? 1 : (tokens + TILE_TOKENS - 1) / TILE_TOKENS) {}

    int64_t first(int64_t tile) const { return tokens * tile / count; }
};

// Inputs of a product, tile by tile, so that what a tile reads lies in one stretch: float32 [k][T]; or bfloat16
// [k / 2][T][2] with the sums float32 [k / 32][T] of its groups; or int8 [k / 4][T][4], in the order of BYTES, with
// [k / 32][3][T] of its groups: scale, sum times scale, and the int32 from which sums of products start. T: tokens of
// the tile.
template <class X>
struct Inputs {
    static constexpr int64_t OF_GROUP = sizeof(X) == 1 ? 3 : 1;
    const X* x;
    const float* sums;
    int64_t k;

    Inputs from(int64_t token) const { return {x + token * k, sums + token * (k / GROUP) * OF_GROUP, k}; }

    // Where in a tile of `tokens` element i of token t lies.
    static constexpr int64_t place(int64_t i, int64_t t, int64_t tokens) {
        return sizeof(X) == 4 ? i * tokens + t : (i / 2 * tokens + t) * 2 + i % 2;
    }
};

struct Scales {
    F16 scale, minimum;
};

template <int K>
INLINE Scales load_scales(const uint8_t* group) {
    const uint16_t* halves = (const uint16_t*)(group + (K == NIBBLES ? 256 : 512));
    if (K == NIBBLES) return {load_float16(halves), load_float16(halves + 16)};
    if (K == BYTES) return {load_float16(halves), splat(0)};
    return {splat(1), splat(0)};
}

template <int K>
constexpr int64_t GROUP_BYTES = K == FLOAT32 ? 2048 : K == BFLOAT16 ? 1024 : K == NIBBLES ? 320 : 544;

// Ask for the group that is read next at this place; processors do not foresee where the next unit lies.
template <int K>
INLINE void fetch(const uint8_t* group, int64_t ahead) {
    if (!ahead) return;
    for (int64_t byte = 0; byte < GROUP_BYTES<K>; byte += 64) __builtin_prefetch(group + ahead + byte);
}

// Both k of pair i of four as float32, scaled.
template <int K>
INLINE void load_pair(const uint8_t* group, int quad, int i, const Scales& scales, F16& even, F16& odd) {
    const int pair = quad * 4 + i;
    if (K == FLOAT32) {
        even = load((const float*)(group + pair * 128));
        odd = load((const float*)(group + pair * 128 + 64));
    } else if (K == BFLOAT16) {
        const W16 words = load_words(group + pair * 64);
        even = low_halves(words);
        odd = high_halves(words);
    } else if (K == NIBBLES) {
        const W16 words = load_words(group + quad * 64);
        const int shift = i * 4;
        EACH_PART {
            even.part[p] = __builtin_convertvector((Ints)(words.part[p] >> shift & 15u), Floats);
            odd.part[p] = __builtin_convertvector((Ints)(words.part[p] >> (shift + 16) & 15u), Floats);
        }
        even = multiply_add(even, scales.scale, scales.minimum);
        odd = multiply_add(odd, scales.scale, scales.minimum);
    } else {
        const W16 words = load_words(group + (quad * 2 + i % 2) * 64);
        const int shift = 8 * (i / 2);
        EACH_PART {
            even.part[p] = __builtin_convertvector((Ints)(words.part[p] << (24 - shift)) >> 24, Floats);
            odd.part[p] = __builtin_convertvector((Ints)(words.part[p] << (8 - shift)) >> 24, Floats);
        }
        even = even * scales.scale;
        odd = odd * scales.scale;
    }
}

// out [T][R × 16] = x [T, k] × R blocks of 16 rows. ROWS: the inputs lie in rows [T][64] instead, and are added to out.
template <int K, int T, int R, bool ROWS = false>
static void tile(const Inputs<float>& in, const uint8_t* const* blocks, int64_t ahead, float* out, int64_t out_stride) {
    constexpr int ACROSS = ROWS ? UNIT_ROWS : 1, ALONG = ROWS ? 1 : T;
    F16 total[T][R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) total[t][r] = ROWS ? load(out + t * out_stride + r * 16) : splat(0);
    const uint8_t* group[R];
    for (int r = 0; r < R; r++) group[r] = blocks[r];
    for (int64_t start = 0; start < in.k; start += GROUP) {
        const int quads = in.k - start < GROUP ? (int)(in.k - start) / 8 : GROUP / 8;
        Scales scales[R];
        for (int r = 0; r < R; r++) fetch<K>(group[r], ahead);
        for (int r = 0; r < R; r++) scales[r] = load_scales<K>(group[r]);
        for (int quad = 0; quad < quads; quad++) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                for (int r = 0; r < R; r++) {
                    F16 even, odd;
                    load_pair<K>(group[r], quad, i, scales[r], even, odd);
                    const float* x = in.x + (start + 8 * quad + 2 * i) * ALONG;
                    for (int t = 0; t < T; t++) {
                        total[t][r] = multiply_add(even, splat(x[t * ACROSS]), total[t][r]);
                        total[t][r] = multiply_add(odd, splat(x[t * ACROSS + ALONG]), total[t][r]);
                    }
                }
            }
        }
        for (int r = 0; r < R; r++) group[r] += GROUP_BYTES<K>;
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) store(out + t * out_stride + r * 16, total[t][r]);
}

#if defined(__AVX512BF16__)
// The integers 0 … 15 as bfloat16, twice: a table for nibbles whose fifth bit is not cleared.
alignas(64) static const uint16_t NIBBLE_TABLE[32] = {
    0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
    0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
    0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
    0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
};

// Pair i of four as bfloat16 [16][2], not scaled.
template <int K>
INLINE W16 load_whole_pair(const uint8_t* group, int quad, int i) {
    W16 out;
    if (K == NIBBLES) {
        const __m512i words = _mm512_loadu_si512(group + quad * 64), table = _mm512_load_si512(NIBBLE_TABLE);
        out.part[0] = (Words)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, i * 4), table);
    } else if (K == BYTES) {
        F16 even, odd;
        load_pair<K>(group, quad, i, {splat(1), splat(0)}, even, odd);
        out.part[0] = (Words)even.part[0] >> 16 | (Words)odd.part[0];  // both exact: nothing is to be rounded
    } else {
        out = load_words(group + (quad * 4 + i) * 64);
    }
    return out;
}

// The same with bfloat16 inputs. Groups are summed before they are scaled: small integers are exact in bfloat16.
template <int K, int T, int R, bool ROWS = false>
static void tile(const Inputs<uint16_t>& in, const uint8_t* const* blocks, int64_t ahead, float* out,
                 int64_t out_stride) {
    constexpr bool GROUPED = K == NIBBLES || K == BYTES;
    F16 sums[T][R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            sums[t][r] = ROWS ? load(out + t * out_stride + r * 16) : splat(0);
            if (GROUPED) store(out + t * out_stride + r * 16, splat(0));
        }
    const uint8_t* group[R];
    for (int r = 0; r < R; r++) group[r] = blocks[r];
    constexpr int ACROSS = ROWS ? UNIT_ROWS : 2, ALONG = ROWS ? 2 : 2 * T;
    const uint16_t* x = in.x;
    for (int64_t start = 0, index = 0; start < in.k; start += GROUP, index++) {
        const int quads = in.k - start < GROUP ? (int)(in.k - start) / 8 : GROUP / 8;
        for (int r = 0; r < R; r++) fetch<K>(group[r], ahead);
        for (int quad = 0; quad < quads; quad++, x += 4 * ALONG) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                W16 weights[R];
                for (int r = 0; r < R; r++) weights[r] = load_whole_pair<K>(group[r], quad, i);
                for (int t = 0; t < T; t++) {
                    const W16 input = splat_word(x + t * ACROSS + i * ALONG);
                    for (int r = 0; r < R; r++) sums[t][r] = dot_pairs(weights[r], input, sums[t][r]);
                }
            }
        }
        if (GROUPED) {
            for (int r = 0; r < R; r++) {
                const Scales scales = load_scales<K>(group[r]);
                for (int t = 0; t < T; t++) {
                    float* total = out + t * out_stride + r * 16;
                    F16 scaled = multiply_add(scales.scale, sums[t][r], load(total));
                    if (K != BYTES) scaled = multiply_add(scales.minimum, splat(in.sums[index * T + t]), scaled);
                    store(total, scaled);
                    sums[t][r] = splat(0);
                }
            }
        }
        for (int r = 0; r < R; r++) group[r] += GROUP_BYTES<K>;
    }
    if (!GROUPED)
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++) store(out + t * out_stride + r * 16, sums[t][r]);
}
#endif

#if defined(__AVX512VNNI__)
constexpr int64_t BYTE_ZERO = 128;  // what is added to bytes of weights, as one side of a product has no sign

// [16][4] weights of which `half` of a group's quad, without sign.
template <int K>
INLINE __m512i load_unsigned(const uint8_t* group, int quad, int half) {
    if (K == NIBBLES) {
        const __m512i words = _mm512_loadu_si512(group + quad * 64);
        return (half ? _mm512_srli_epi16(words, 4) : words) & _mm512_set1_epi8(15);
    }
    return _mm512_loadu_si512(group + (quad * 2 + half) * 64) ^ _mm512_set1_epi8((char)BYTE_ZERO);
}

// The same with int8 inputs: groups are summed in int32, which is exact, and scaled by weights' and inputs' scales.
template <int K, int T, int R, bool ROWS = false>
static void tile(const Inputs<int8_t>& in, const uint8_t* const* blocks, int64_t ahead, float* out,
                 int64_t out_stride) {
    __m512 total[T][R];
    const uint8_t* group[R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) total[t][r] = _mm512_setzero_ps();
    for (int r = 0; r < R; r++) group[r] = blocks[r];
    const int8_t* x = in.x;
    const float* of_group = in.sums;
    for (int64_t start = 0; start < in.k; start += GROUP, x += GROUP * T, of_group += 3 * T) {
        __m512i sums[T][R];
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++)
                sums[t][r] = K == BYTES ? _mm512_set1_epi32(((const int32_t*)of_group)[2 * T + t])
                                        : _mm512_setzero_si512();
        for (int r = 0; r < R; r++) fetch<K>(group[r], ahead);
#pragma GCC unroll 8
        for (int i = 0; i < GROUP / 4; i++) {
            __m512i weights[R];
            for (int r = 0; r < R; r++) weights[r] = load_unsigned<K>(group[r], i / 2, i % 2);
            for (int t = 0; t < T; t++) {
                const __m512i input = (__m512i)splat_word(x + (i * T + t) * 4).part[0];
                for (int r = 0; r < R; r++) sums[t][r] = _mm512_dpbusd_epi32(sums[t][r], weights[r], input);
            }
        }
        for (int r = 0; r < R; r++) {
            const Scales scales = load_scales<K>(group[r]);
            for (int t = 0; t < T; t++) {
                const __m512 scale = (__m512)scales.scale.part[0] * _mm512_set1_ps(of_group[t]);
                total[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][r]), scale, total[t][r]);
                if (K == NIBBLES)
                    total[t][r] = _mm512_fmadd_ps((__m512)scales.minimum.part[0], _mm512_set1_ps(of_group[T + t]),
                                                  total[t][r]);
            }
            group[r] += GROUP_BYTES<K>;
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) _mm512_storeu_ps(out + t * out_stride + r * 16, total[t][r]);
}

INLINE int expand(int kind, const uint8_t*, int64_t, uint8_t*, const Inputs<int8_t>&) { return kind; }
#endif

// One tile over the B blocks of a unit: out [T] at a stride of 64.
template <int K, int B, int T, bool ROWS, class X>
static void unit_tile(const Inputs<X>& in, const uint8_t* const* blocks, int64_t ahead, float* out) {
    constexpr int R = sizeof(X) == 1 && T > 3 ? 2 : tile_blocks(B, T);  // of int8, a sum takes two registers
    for (int r = 0; r < B; r += R) tile<K, T, R, ROWS>(in, blocks + r, ahead, out + r * 16, UNIT_ROWS);
}

template <int K, int B, bool ROWS = false, class X>
static void tile_of(int tokens, const Inputs<X>& in, const uint8_t* const* blocks, int64_t ahead, float* out) {
    switch (tokens) {
        case 1: return unit_tile<K, B, 1, ROWS>(in, blocks, ahead, out);
        case 2: return unit_tile<K, B, 2, ROWS>(in, blocks, ahead, out);
        case 3: return unit_tile<K, B, 3, ROWS>(in, blocks, ahead, out);
        case 4: return unit_tile<K, B, 4, ROWS>(in, blocks, ahead, out);
#if defined(__AVX512F__)
        case 5: return unit_tile<K, B, 5, ROWS>(in, blocks, ahead, out);
        case 6: return unit_tile<K, B, 6, ROWS>(in, blocks, ahead, out);
    }
    if constexpr (!ROWS && sizeof(X) > 1) {
        switch (tokens) {
            case 7: return unit_tile<K, B, 7, ROWS>(in, blocks, ahead, out);
            case 8: return unit_tile<K, B, 8, ROWS>(in, blocks, ahead, out);
            case 9: return unit_tile<K, B, 9, ROWS>(in, blocks, ahead, out);
            case 10: return unit_tile<K, B, 10, ROWS>(in, blocks, ahead, out);
            case 11: return unit_tile<K, B, 11, ROWS>(in, blocks, ahead, out);
            case 12: return unit_tile<K, B, 12, ROWS>(in, blocks, ahead, out);
        }
#endif
    }
    __builtin_trap();
}

template <int B, class X>
static void any_tile(int kind, int tokens, const Inputs<X>& in, const uint8_t* const* blocks, int64_t ahead,
                     float* out) {
    switch (kind) {
        case FLOAT32:
            if constexpr (sizeof(X) == 4) return tile_of<FLOAT32, B>(tokens, in, blocks, ahead, out);
            break;
        case BFLOAT16:
            if constexpr (sizeof(X) > 1) return tile_of<BFLOAT16, B>(tokens, in, blocks, ahead, out);
            break;
        case NIBBLES: return tile_of<NIBBLES, B>(tokens, in, blocks, ahead, out);
        case BYTES: return tile_of<BYTES, B>(tokens, in, blocks, ahead, out);
    }
    __builtin_trap();
}

template <int K>
static void expand_to_float32(const uint8_t* block, int64_t k, uint8_t* out) {
    for (int64_t start = 0; start < k; start += GROUP, block += GROUP_BYTES<K>) {
        const Scales scales = load_scales<K>(block);
        for (int quad = 0; quad < GROUP / 8; quad++) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, out += 128) {
                F16 even, odd;
                load_pair<K>(block, quad, i, scales, even, odd);
                store((float*)out, even);
                store((float*)(out + 64), odd);
            }
        }
    }
}

// Unpack a block once for many tokens; returns the kind it then has.
INLINE int expand(int kind, const uint8_t* block, int64_t k, uint8_t* out, const Inputs<float>&) {
    if (kind == BFLOAT16) expand_to_float32<BFLOAT16>(block, k, out);
    if (kind == NIBBLES) expand_to_float32<NIBBLES>(block, k, out);
    if (kind == BYTES) expand_to_float32<BYTES>(block, k, out);
    return FLOAT32;
}

#if defined(__AVX512BF16__)
// The order in which the two halves of a register become pairs.
alignas(64) static const uint16_t ZIPPED[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
alignas(64) static const float NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <int K>
static void expand_to_bfloat16(const uint8_t* block, int64_t k, uint8_t* out) {
    for (int64_t start = 0; start < k; start += GROUP, block += GROUP_BYTES<K>) {
        const Scales scales = load_scales<K>(block);
        for (int quad = 0; quad < GROUP / 8; quad++) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, out += 64) {
                F16 even, odd;
                if (K == NIBBLES) {
                    // Lookups mind the lowest four bits of an index only: nothing is to be masked.
                    const __m512i words = _mm512_loadu_si512(block + quad * 64);
                    const __m512 numbers = _mm512_load_ps(NUMBERS);
                    even.part[0] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(words, i * 4), numbers);
                    odd.part[0] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(words, i * 4 + 16), numbers);
                    even = multiply_add(even, scales.scale, scales.minimum);
                    odd = multiply_add(odd, scales.scale, scales.minimum);
                } else {
                    load_pair<K>(block, quad, i, scales, even, odd);
                }
                const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd.part[0], (__m512)even.part[0]);
                _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(ZIPPED), halves));
            }
        }
    }
}

INLINE int expand(int kind, const uint8_t* block, int64_t k, uint8_t* out, const Inputs<uint16_t>&) {
    if (kind == NIBBLES) expand_to_bfloat16<NIBBLES>(block, k, out);
    if (kind == BYTES) expand_to_bfloat16<BYTES>(block, k, out);
    return BFLOAT16;
}
#endif

template <class X>
INLINE bool is_ready(int kind) {
    return kind == FLOAT32 || (kind == BFLOAT16 && sizeof(X) == 2) || sizeof(X) == 1;
}

// Of B blocks (two or four), call finish(first token of the tile, token in it, tokens of it, float32[16 × B]) for every
// token. ahead: bytes from a block to the one at its place in the next unit. scratch: 4 × k × 64 bytes.
template <int B, class X, class Finish>
static void multiply_unit(
    const Inputs<X>& in, const Tiles<X>& tiles, int kind, const uint8_t* const* blocks, int64_t ahead, uint8_t* scratch,
    Finish finish) {
    alignas(64) float out[FEW * UNIT_ROWS];
    const uint8_t* ready[B];
    for (int r = 0; r < B; r++) ready[r] = blocks[r];
    if (tiles.count > 1 && !is_ready<X>(kind)) {
        int expanded = kind;
        for (int r = 0; r < B; r++) {
            uint8_t* own = scratch + r * in.k * 64;
            expanded = expand(kind, blocks[r], in.k, own, in);
            ready[r] = own;
        }
        kind = expanded;
    }
    for (int64_t tile = 0; tile < tiles.count; tile++) {
        const int64_t first = tiles.first(tile), tokens = tiles.first(tile + 1) - first;
        const bool is_next_foreseen = tiles.count == 1 || (sizeof(X) == 1 && tile == tiles.count - 1);
        any_tile<B, X>(kind, (int)tokens, in.from(first), ready, is_next_foreseen ? ahead : 0, out);
        for (int64_t t = 0; t < tokens; t++) finish(first, t, tokens, out + t * UNIT_ROWS);
    }
}
