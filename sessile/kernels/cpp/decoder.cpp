// All layers of a decoder for one step, and single linear layers, on the CPU.
//
// Every function that is exported is run by all threads of torch's OpenMP runtime at once, with one pointer to its
// arguments; native.py lays them out, checks them and keeps them alive. Work is taken in small pieces by whoever is
// free, so that a thread that loses its core delays the others by one piece.

#include <atomic>
#include <sched.h>
#include <time.h>

#include "attention.h"

enum InputType { FLOAT32_INPUTS, BFLOAT16_INPUTS, INT8_INPUTS };
enum PoolType { FLOAT32_POOL, BFLOAT16_POOL, INT8_POOL };

struct Linear {
    int64_t kind, blocks, rows, k, bias;
};

struct Layer {
    int64_t input_norm, post_norm, q_norm, k_norm, keys, values, key_scales, value_scales;
    Linear qkv, output, gate_up, down;
};

// The threads of one call, which go through the same phases. A phase is over when its pieces are done, whoever did
// them: nobody waits for a thread that lost its core between two pieces; it finds the phase over when it comes back.
class Team {
  public:
    const int64_t thread, threads;

    Team(int64_t* counts, int64_t thread, int64_t threads)
        : thread(thread), threads(threads), phase_((Count*)counts) {}

    // run(first, end) for stretches of so many pieces, until all are done by anybody; all that was written in it can be
    // read after. A stretch is half of a fair share, as neighbours lie side by side in memory, down to one piece near
    // the end.
    template <class Run>
    void share(int64_t pieces, Run run) {
        int64_t first = phase_->begun.load(std::memory_order_relaxed);
        while (first < pieces) {
            const int64_t half = (pieces - first) / (2 * threads), taken = half < 1 ? 1 : half;
            if (!phase_->begun.compare_exchange_weak(first, first + taken, std::memory_order_relaxed)) continue;
            run(first, first + taken);
            phase_->done.fetch_add(taken, std::memory_order_acq_rel);
            first = phase_->begun.load(std::memory_order_relaxed);
        }
        wait(pieces);
    }

    // run(piece) for each piece, one at a time, until all are done.
    template <class Run>
    void each(int64_t pieces, Run run) {
        for (int64_t piece; (piece = phase_->begun.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            run(piece);
            phase_->done.fetch_add(1, std::memory_order_acq_rel);
        }
        wait(pieces);
    }

  private:
    // One for each phase of a call, zero at the start and never used again: who comes late disturbs no later phase.
    struct Count {
        std::atomic<int64_t> begun, done;
    };

    Count* phase_;

    // Spins, as the rest is microseconds away, but gives the core up when it is not: somebody may be waiting for it.
    void wait(int64_t pieces) {
        for (int spins = 0; phase_->done.load(std::memory_order_acquire) < pieces; spins++) {
            if (spins > 2000) sched_yield();
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        phase_++;
    }
};

struct OpenMp {
    int64_t thread_number, thread_count;

    Team team(int64_t* counts) const {
        return Team(counts, ((int (*)())thread_number)(), ((int (*)())thread_count)());
    }
};

struct Step {
    OpenMp openmp;
    int64_t layers, tokens, hidden, heads, kv_heads, d, inner;
    int64_t inputs, pool;  // InputType of all its linear layers, and PoolType
    int64_t row_pages, page_size;
    double epsilon;
    int64_t layer_table, residual, cosine, sine, slots, table;
    int64_t queries, query_table;  // int32 [queries][4]: token, row, its first item, items
    int64_t items, item_table;  // int32 [items][3]: query, first history token, end
    int64_t chunks, chunk_table;  // int32 [chunks][5]: first token, row, position of that token, tokens, first tile
    int64_t key_tiles, query_tiles;  // of all chunks: of KEY_TILE keys, and of QUERY_TILE positions
    int64_t is_read;  // whether anybody reads the residual stream: else all that matters of the last layer is K and V
    int64_t nanoseconds;  // 0, or int64 [PHASES] to which the time of each phase is added
    int64_t counts;  // int64 [PHASES_MAX × layers][2], zero
    int64_t scratch, scratch_bytes;
};

constexpr int64_t PHASES_MAX = 12;  // of a layer, told apart by their counts

enum Phase { PREPARE, QKV, ROTATE, CHUNKS, QUERIES, OUTPUT, GATE_UP, DOWN, PHASES };

// Where the time of the first thread goes, if somebody asks.
class Stopwatch {
  public:
    Stopwatch(int64_t nanoseconds, int64_t thread) : laps_(thread ? nullptr : (int64_t*)nanoseconds), last_(now()) {}

    void lap(Phase phase) {
        if (!laps_) return;
        const int64_t time = now();
        laps_[phase] += time - last_;
        last_ = time;
    }

  private:
    int64_t* laps_;
    int64_t last_;

    int64_t now() const {
        timespec time{};
        if (laps_) clock_gettime(CLOCK_MONOTONIC, &time);
        return time.tv_sec * 1000000000 + time.tv_nsec;
    }
};

// Where a step's intermediate values lie. X: what linear layers multiply, A: what chunks are attended in.
template <class X, class A>
struct Layout {
    float *qkv, *attended, *tops, *totals, *mixed;
    X *normed, *gated;
    A *keys, *values, *widened;
    float *normed_sums, *gated_sums;
    uint8_t *units, *tiles, *whole;
    X* own_inputs;
    float* own_sums;
    int64_t bytes = 0;
    int64_t d_padded;

    // Up to so many, each thread prepares inputs for itself and need not wait for another's. One tile, so at most FEW.
    static constexpr int64_t OWN_TOKENS = 4;

    Layout(const Step& s, int64_t thread, int64_t threads) {
        uint8_t* base = (uint8_t*)s.scratch;
        const int64_t wide = s.heads * s.d > s.inner ? (s.heads * s.d > s.hidden ? s.heads * s.d : s.hidden)
                                                     : (s.inner > s.hidden ? s.inner : s.hidden);
        d_padded = (s.d + 15) / 16 * 16;
        auto place = [&](auto*& at, int64_t count) {
            bytes = (bytes + 63) / 64 * 64;
            at = (std::remove_reference_t<decltype(at)>)(base + bytes);
            bytes += count * (int64_t)sizeof(*at);
        };
        place(qkv, s.tokens * (s.heads + 2 * s.kv_heads) * s.d);
        place(attended, s.tokens * s.heads * s.d);
        place(normed, s.tokens * wide);
        place(normed_sums, s.tokens * wide / GROUP * Inputs<X>::OF_GROUP);
        place(gated, s.tokens * s.inner);
        place(gated_sums, s.tokens * s.inner / GROUP * Inputs<X>::OF_GROUP);
        place(tops, s.items * s.heads);
        place(totals, s.items * s.heads);
        place(mixed, s.items * s.heads * s.d);
        place(keys, s.key_tiles * KEY_TILE * s.kv_heads * s.d);
        place(values, s.key_tiles * KEY_TILE * s.kv_heads * d_padded);
        const int64_t unit_bytes = UNIT_BLOCKS * wide * 64;
        const int64_t vectors = QUERY_TILE * (s.heads / s.kv_heads);
        const int64_t own_sum_count = OWN_TOKENS * wide / GROUP * Inputs<X>::OF_GROUP + 16;
        const int64_t tile_bytes = (TileScratch<A>::bytes(vectors, s.d) + 63) / 64 * 64;
        place(units, unit_bytes * threads);
        place(tiles, tile_bytes * threads);
        place(whole, WholeQueries<int8_t>::bytes(s.heads, s.d) * threads);
        place(widened, s.pool == INT8_POOL ? 2 * KEY_TILE * s.d * threads : 0);
        place(own_inputs, OWN_TOKENS * wide * threads);
        place(own_sums, own_sum_count * threads);
        units += thread * unit_bytes;
        tiles += thread * tile_bytes;
        whole += thread * WholeQueries<int8_t>::bytes(s.heads, s.d);
        widened += thread * 2 * KEY_TILE * s.d;
        own_inputs += thread * OWN_TOKENS * wide;
        own_sums += thread * own_sum_count;
    }
};

#if defined(__AVX512VNNI__)
// Order of bytes, of every eight, in which int8 inputs lie (see BYTES).
alignas(16) static const int8_t OCTET_ORDER[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};

// A group of 32 of token t as int8, scaled so that the largest becomes 127.
INLINE void round_group(F16 low, F16 high, int64_t t, int64_t tokens, int8_t* out, float* of_group) {
    const F16 zero = splat(0);
    const float most = largest(maximum(maximum(low, zero - low), maximum(high, zero - high)));
    const F16 factor = splat(most > 0 ? 127.0f / most : 0.0f);
    const __m512i first = _mm512_cvtps_epi32((__m512)(low * factor).part[0]);
    const __m512i second = _mm512_cvtps_epi32((__m512)(high * factor).part[0]);
    const int32_t total = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second)), start = (int32_t)-BYTE_ZERO * total;
    const __m128i order = _mm_load_si128((const __m128i*)OCTET_ORDER);
    alignas(16) int8_t bytes[GROUP];
    _mm_store_si128((__m128i*)bytes, _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(first), order));
    _mm_store_si128((__m128i*)(bytes + 16), _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(second), order));
    for (int quad = 0; quad < GROUP / 4; quad++) memcpy(out + (quad * tokens + t) * 4, bytes + 4 * quad, 4);
    const float scale = most / 127;
    of_group[t] = scale;
    of_group[tokens + t] = scale * (float)total;
    memcpy(of_group + 2 * tokens + t, &start, 4);
}
#endif

// Token t of a tile, float32[k], as a product takes it, times a factor, times weights if there are any; k a multiple of
// 32. out, sums: of the tile.
template <class X>
static void prepare_token(const float* values, const float* weight, float factor, int64_t k, int64_t t, int64_t tokens,
                          X* out, float* sums) {
    alignas(64) X group[GROUP];
    for (int64_t i = 0; i < k; i += GROUP) {
        F16 low = load(values + i) * splat(factor), high = load(values + i + 16) * splat(factor);
        if (weight) low = low * load(weight + i), high = high * load(weight + i + 16);
        X* at = out + i * tokens;
        if constexpr (sizeof(X) == 1) {
            round_group(low, high, t, tokens, at, sums + i / GROUP * 3 * tokens);
            continue;
        } else {
            store_as(group, low);
            store_as(group + 16, high);
        }
        if constexpr (sizeof(X) == 2) {
            for (int pair = 0; pair < GROUP / 2; pair++) memcpy(at + (pair * tokens + t) * 2, group + 2 * pair, 4);
            sums[i / GROUP * tokens + t] = sum(load_bfloat16(group) + load_bfloat16(group + 16));
        } else {
            for (int j = 0; j < GROUP; j++) at[j * tokens + t] = group[j];
        }
    }
}

static float norm_factor(const float* x, int64_t k, float epsilon) {
    float total = 0;
    int64_t i = 0;
    F16 sums = splat(0);
    for (; i + 16 <= k; i += 16) sums = multiply_add(load(x + i), load(x + i), sums);
    total = sum(sums);
    for (; i < k; i++) total += x[i] * x[i];
    return 1.0f / __builtin_sqrtf(total / (float)k + epsilon);
}

// Inputs for a product from float32 [t, k], normed if there is a weight. By all, or by each thread for itself.
template <class X, class A>
static Inputs<X> prepare(Team& team, Layout<X, A>& at, const float* x, const float* weight, float epsilon,
                         int64_t tokens, int64_t k) {
    const Tiles<X> tiles(tokens);
    const bool is_own = tokens <= Layout<X, A>::OWN_TOKENS;
    const Inputs<X> out = is_own ? Inputs<X>{at.own_inputs, at.own_sums, k} : Inputs<X>{at.normed, at.normed_sums, k};
    auto one = [&](int64_t tile) {
        const int64_t first = tiles.first(tile), end = tiles.first(tile + 1);
        const Inputs<X> own = out.from(first);
        for (int64_t t = first; t < end; t++) {
            const float factor = weight ? norm_factor(x + t * k, k, epsilon) : 1.0f;
            prepare_token(x + t * k, weight, factor, k, t - first, end - first, (X*)own.x, (float*)own.sums);
        }
    };
    if (is_own) {
        one(0);
        return out;
    }
    team.each(tiles.count, one);
    return out;
}

// finish(token, first row, rows, float32[rows]) for every token and every stretch of a layer's rows.
template <class X, class Finish>
static void multiply(Team& team, const Inputs<X>& in, int64_t tokens, const Linear& linear, uint8_t* scratch,
                     Finish finish) {
    const int64_t pieces = (linear.rows + 31) / 32, bytes = block_bytes((int)linear.kind, linear.k);
    const float* bias = (const float*)linear.bias;
    const Tiles<X> tiles(tokens);
    team.share(pieces, [&](int64_t piece, int64_t end) {
        while (piece < end) {
            const int64_t wide = end - piece >= 2 ? 2 : 1, first = piece * 32;
            const uint8_t* blocks[UNIT_BLOCKS];
            for (int r = 0; r < 2 * wide; r++) blocks[r] = (const uint8_t*)linear.blocks + (piece * 2 + r) * bytes;
            const int64_t rows = linear.rows - first < 32 * wide ? linear.rows - first : 32 * wide;
            auto with_bias = [&](int64_t tile_first, int64_t t, int64_t, float* out) {
                if (bias)
                    for (int64_t row = 0; row < rows; row++) out[row] += bias[first + row];
                finish(tile_first + t, first, rows, out);
            };
            if (wide == 2)
                multiply_unit<4>(in, tiles, (int)linear.kind, blocks, 4 * bytes, scratch, with_bias);
            else
                multiply_unit<2>(in, tiles, (int)linear.kind, blocks, 2 * bytes, scratch, with_bias);
            piece += wide;
        }
    });
}

INLINE void copy_rows(float* to, const float* from, int64_t rows) {
    int64_t i = 0;
    for (; i + 16 <= rows; i += 16) store(to + i, load(from + i));
    for (; i < rows; i++) to[i] = from[i];
}

INLINE F16 silu(F16 gate) {
    const F16 zero = splat(0), one = splat(1);
    const F16 size = maximum(gate, zero - gate);
    // Of the two ways to write the sigmoid, the one whose exponential cannot overflow.
    const F16 decay = power_of_two((zero - size) * splat(LOG2_E));
    F16 top = one;
    EACH_PART top.part[p] = gate.part[p] >= 0 ? one.part[p] : decay.part[p];
    return gate * top / (one + decay);
}

// silu(gate) × up [t, inner], as inputs.
template <class X, class A>
static Inputs<X> multiply_gated(Team& team, const Inputs<X>& in, int64_t tokens, const Linear& linear,
                                Layout<X, A>& at) {
    const int64_t inner = linear.rows / 2, pieces = inner / GROUP, bytes = block_bytes((int)linear.kind, linear.k);
    const uint8_t *gate = (const uint8_t*)linear.blocks, *up = gate + inner / 16 * bytes;
    const float* bias = (const float*)linear.bias;
    const Tiles<X> tiles(tokens);
    auto multiply_piece = [&](int64_t piece) {
        const uint8_t* blocks[4] = {gate + piece * 2 * bytes, gate + (piece * 2 + 1) * bytes, up + piece * 2 * bytes,
                                    up + (piece * 2 + 1) * bytes};
        const int64_t first = piece * GROUP;
        auto finish = [&](int64_t tile_first, int64_t t, int64_t count, float* out) {
            float values[GROUP];
            if (bias)
                for (int i = 0; i < GROUP; i++) out[i] += bias[first + i], out[GROUP + i] += bias[inner + first + i];
            for (int i = 0; i < GROUP; i += 16) store(values + i, silu(load(out + i)) * load(out + GROUP + i));
            prepare_token(values, (const float*)nullptr, 1.0f, GROUP, t, count,
                          at.gated + tile_first * inner + first * count,
                          at.gated_sums + (tile_first * (inner / GROUP) + piece * count) * Inputs<X>::OF_GROUP);
        };
        multiply_unit<4>(in, tiles, (int)linear.kind, blocks, 2 * bytes, at.units, finish);
    };
    team.share(pieces, [&](int64_t piece, int64_t end) {
        for (; piece < end; piece++) multiply_piece(piece);
    });
    return {at.gated, at.gated_sums, inner};
}

static void rotate(float* head, const float* cosine, const float* sine, int64_t d) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = head[i], high = head[half + i];
        head[i] = low * cosine[i] - high * sine[i];
        head[half + i] = high * cosine[i] + low * sine[i];
    }
}

static void norm_head(float* head, const float* weight, int64_t d, float epsilon) {
    const float factor = norm_factor(head, d, epsilon);
    for (int64_t i = 0; i < d; i++) head[i] = head[i] * factor * weight[i];
}

// Norm and rotate queries and keys of one token in place; store its K and V.
template <class P>
static void place_token(const Step& s, const Layer& layer, const Pool<P>& pool, float* heads, int64_t t) {
    const float *cosine = (const float*)s.cosine + t * (s.d / 2), *sine = (const float*)s.sine + t * (s.d / 2);
    for (int64_t head = 0; head < s.heads + s.kv_heads; head++) {
        const int64_t norm = head < s.heads ? layer.q_norm : layer.k_norm;
        if (norm) norm_head(heads + head * s.d, (const float*)norm, s.d, (float)s.epsilon);
        rotate(heads + head * s.d, cosine, sine, s.d);
    }
    const float *key = heads + s.heads * s.d, *value = key + s.kv_heads * s.d;
    for (int64_t head = 0; head < s.kv_heads; head++) {
        const int64_t place = ((const int64_t*)s.slots)[t] * s.kv_heads + head;
        store_head(key + head * s.d, s.d, pool.keys + place * s.d, pool.key_scales + place);
        store_head(value + head * s.d, s.d, pool.values + place * s.d, pool.value_scales + place);
    }
}

// What the items of a query found for one head → out [d].
template <class X, class A>
static void merge_items(const Layout<X, A>& at, const Step& s, int64_t first, int64_t last, int64_t head, float* out) {
    float top = LOWEST, total = 0;
    for (int64_t item = first; item < last; item++)
        top = at.tops[item * s.heads + head] > top ? at.tops[item * s.heads + head] : top;
    for (int64_t i = 0; i < s.d; i++) out[i] = 0;
    for (int64_t item = first; item < last; item++) {
        const float share = power_of_two(splat(at.tops[item * s.heads + head] - top)).part[0][0];
        const float* mixed = at.mixed + (item * s.heads + head) * s.d;
        total += at.totals[item * s.heads + head] * share;
        for (int64_t i = 0; i < s.d; i++) out[i] += mixed[i] * share;
    }
    for (int64_t i = 0; i < s.d; i++) out[i] /= total;
}

// Pieces of histories of single queries, then their merges. All heads go through a tile of keys before any goes on: they
// lie side by side, and memory is read in order. Behind a piece's end, what this thread probably takes next is asked for.
template <class X, class A, class P>
static void attend_queries(Team& team, const Step& s, const Pool<P>& pool, Layout<X, A>& at) {
    const int64_t group = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * s.d;
    const int32_t(*queries)[4] = (const int32_t(*)[4])s.query_table;
    const int32_t(*items)[3] = (const int32_t(*)[3])s.item_table;
    team.each(s.items, [&](int64_t item) {
        const int32_t* query = queries[items[item][0]];
        const int64_t next = item + team.threads < s.items ? item + team.threads : item, end = items[item][2];
        const Partials partials = Partials{at.tops, at.totals, at.mixed}.from(item * s.heads, s.d);
        for (int64_t head = 0; head < s.heads; head++) partials.tops[head] = -3.0e38f, partials.totals[head] = 0;
        memset(partials.mixed, 0, s.heads * s.d * sizeof(float));
        const float* heads = at.qkv + query[0] * width;
        WholeQueries<P>::set(heads, s.heads, s.d, at.whole);
        Keys keys;
        for (int64_t start = items[item][1]; start < end; start += KEY_TILE) {
            keys.count = (int)(end - start < KEY_TILE ? end - start : KEY_TILE);
            find_keys(pool, query[1], start, keys.count, keys.places);
            if (start + KEY_TILE < end)
                find_keys(pool, query[1], start + KEY_TILE, end - start - KEY_TILE, keys.later);
            else
                find_keys(pool, queries[items[next][0]][1], items[next][1], items[next][2] - items[next][1], keys.later);
            for (int64_t kv_head = 0; kv_head < s.kv_heads; kv_head++)
                attend_keys(pool, keys, kv_head, group, heads + kv_head * group * s.d, at.whole,
                            partials.from(kv_head * group, s.d));
        }
    });
    team.each(s.queries, [&](int64_t index) {
        const int32_t* query = queries[index];
        for (int64_t head = 0; head < s.heads; head++)
            merge_items(at, s, query[2], query[2] + query[3], head,
                        at.attended + ((int64_t)query[0] * s.heads + head) * s.d);
    });
}

// Chunks of prompts: their histories packed once, then tiles of queries. The last tiles see most, so they go first.
template <class X, class A, class P>
static void attend_chunks(Team& team, const Step& s, const Pool<P>& pool, Layout<X, A>& at) {
    const int64_t group = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * s.d;
    const int32_t(*chunks)[5] = (const int32_t(*)[5])s.chunk_table;
    team.each(s.key_tiles * s.kv_heads, [&](int64_t job) {
        const int64_t tile = job / s.kv_heads, kv_head = job % s.kv_heads;
        int64_t chunk = s.chunks - 1;
        while (chunks[chunk][4] > tile) chunk--;
        const int64_t start = (tile - chunks[chunk][4]) * KEY_TILE, end = chunks[chunk][2] + chunks[chunk][3];
        const int64_t tiles = (end + KEY_TILE - 1) / KEY_TILE, base = chunks[chunk][4] * s.kv_heads + kv_head * tiles;
        const int64_t place = (base + tile - chunks[chunk][4]) * KEY_TILE;
        pack_tile(pool, chunks[chunk][1], kv_head, start, end, at.d_padded, at.widened, at.keys + place * s.d,
                  at.values + place * at.d_padded);
    });
    const int64_t jobs = s.query_tiles * s.kv_heads;
    team.each(jobs, [&](int64_t job) {
        int64_t tile = (jobs - 1 - job) / s.kv_heads, chunk = 0;
        const int64_t kv_head = job % s.kv_heads;
        while (tile >= (chunks[chunk][3] + QUERY_TILE - 1) / QUERY_TILE)
            tile -= (chunks[chunk++][3] + QUERY_TILE - 1) / QUERY_TILE;
        const int32_t* own = chunks[chunk];
        const int64_t first = tile * QUERY_TILE, positions = own[3] - first < QUERY_TILE ? own[3] - first : QUERY_TILE;
        const int64_t tiles = (own[2] + own[3] + KEY_TILE - 1) / KEY_TILE;
        const int64_t base = (own[4] * s.kv_heads + kv_head * tiles) * KEY_TILE;
        const int64_t t = own[0] + first, head = kv_head * group;
        attend_tile<A>(at.qkv + t * width + head * s.d, width, at.attended + (t * s.heads + head) * s.d,
                       s.heads * s.d, positions, group, s.d, at.d_padded, own[2] + first, at.keys + base * s.d,
                       at.values + base * at.d_padded, at.tiles);
    });
}

template <class X, class A, class P>
static void run_layers(const Step& s, Team& team) {
    Layout<X, A> at(s, team.thread, team.threads);
    if (at.bytes > s.scratch_bytes) __builtin_trap();
    float* residual = (float*)s.residual;
    const float epsilon = (float)s.epsilon;
    const int64_t width = (s.heads + 2 * s.kv_heads) * s.d;
    auto add = [&](int64_t t, int64_t first, int64_t rows, const float* out) {
        float* own = residual + t * s.hidden + first;  // rows and hidden are multiples of 32
        for (int64_t i = 0; i < rows; i += 16) store(own + i, load(own + i) + load(out + i));
    };
    Stopwatch watch(s.nanoseconds, team.thread);
    for (int64_t index = 0; index < s.layers; index++) {
        const Layer& layer = ((const Layer*)s.layer_table)[index];
        const Pool<P> pool{(P*)layer.keys, (P*)layer.values, (float*)layer.key_scales, (float*)layer.value_scales,
                           (const int32_t*)s.table, s.row_pages, s.page_size, s.kv_heads, s.d};
        auto in = prepare(team, at, residual, (const float*)layer.input_norm, epsilon, s.tokens, s.hidden);
        watch.lap(PREPARE);
        multiply(team, in, s.tokens, layer.qkv, at.units,
                 [&](int64_t t, int64_t first, int64_t rows, const float* out) {
                     copy_rows(at.qkv + t * width + first, out, rows);
                 });
        watch.lap(QKV);
        team.each(s.tokens, [&](int64_t t) { place_token(s, layer, pool, at.qkv + t * width, t); });
        watch.lap(ROTATE);
        if (index + 1 == s.layers && !s.is_read) return;
        if (s.chunks) attend_chunks(team, s, pool, at);
        watch.lap(CHUNKS);
        if (s.queries) attend_queries(team, s, pool, at);
        watch.lap(QUERIES);
        in = prepare(team, at, at.attended, nullptr, epsilon, s.tokens, s.heads * s.d);
        watch.lap(PREPARE);
        multiply(team, in, s.tokens, layer.output, at.units, add);
        watch.lap(OUTPUT);
        in = prepare(team, at, residual, (const float*)layer.post_norm, epsilon, s.tokens, s.hidden);
        watch.lap(PREPARE);
        in = multiply_gated(team, in, s.tokens, layer.gate_up, at);
        watch.lap(GATE_UP);
        multiply(team, in, s.tokens, layer.down, at.units, add);
        watch.lap(DOWN);
    }
}

template <class X, class A>
static void run_over_pool(const Step& s, Team& team) {
    if (s.pool == INT8_POOL) return run_layers<X, A, int8_t>(s, team);
    if (s.pool == BFLOAT16_POOL) return run_layers<X, A, uint16_t>(s, team);
    if constexpr (sizeof(A) == 4) return run_layers<X, A, float>(s, team);
    __builtin_trap();  // computed in bfloat16, K and V are kept in no more
}

struct Product {
    OpenMp openmp;
    Linear linear;
    int64_t tokens, inputs, x, out, counts, scratch, scratch_bytes;
};

// Where the inputs of one product lie, and each thread's unpacked weights.
template <class X>
struct ProductLayout {
    Inputs<X> in;
    uint8_t* units;
    int64_t bytes;

    ProductLayout(const Product& p, int64_t thread, int64_t threads) {
        const int64_t k = p.linear.k, x_bytes = (p.tokens * k * (int64_t)sizeof(X) + 63) / 64 * 64;
        const int64_t sums_bytes = (p.tokens * (k / GROUP) * Inputs<X>::OF_GROUP * 4 + 63) / 64 * 64;
        uint8_t* base = (uint8_t*)p.scratch;
        in = {(X*)base, (float*)(base + x_bytes), k};
        units = base + x_bytes + sums_bytes + thread * UNIT_BLOCKS * k * 64;
        bytes = x_bytes + sums_bytes + threads * UNIT_BLOCKS * k * 64;
    }
};

template <class X>
static void run_product(const Product& p, Team& team) {
    ProductLayout<X> at(p, team.thread, team.threads);
    if (at.bytes > p.scratch_bytes) __builtin_trap();
    const int64_t k = p.linear.k;
    const Tiles<X> tiles(p.tokens);
    team.each(tiles.count, [&](int64_t tile) {
        const int64_t first = tiles.first(tile), end = tiles.first(tile + 1);
        const Inputs<X> own = at.in.from(first);
        for (int64_t t = first; t < end; t++)
            prepare_token((const float*)p.x + t * k, (const float*)nullptr, 1.0f, k, t - first, end - first,
                          (X*)own.x, (float*)own.sums);
    });
    multiply(team, at.in, p.tokens, p.linear, at.units, [&](int64_t t, int64_t first, int64_t rows, const float* out) {
        copy_rows((float*)p.out + t * p.linear.rows + first, out, rows);
    });
}

extern "C" {

// Whether this build multiplies inputs of an InputType; others widen to float32.
int64_t sessile_multiplies(int64_t inputs) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    return inputs <= INT8_INPUTS;
#else
    return inputs == FLOAT32_INPUTS;
#endif
}

int64_t sessile_step_bytes(const Step* s, int64_t threads) {
    switch (s->inputs) {
        case INT8_INPUTS: return Layout<int8_t, uint16_t>(*s, 0, threads).bytes;
        case BFLOAT16_INPUTS: return Layout<uint16_t, uint16_t>(*s, 0, threads).bytes;
        default: return Layout<float, float>(*s, 0, threads).bytes;
    }
}

int64_t sessile_product_bytes(const Product* p, int64_t threads) {
    return ProductLayout<float>(*p, 0, threads).bytes;
}

void sessile_step(const Step* s) {
    Team team = s->openmp.team((int64_t*)s->counts);
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    if (s->inputs == INT8_INPUTS) return run_over_pool<int8_t, uint16_t>(*s, team);
    if (s->inputs == BFLOAT16_INPUTS) return run_over_pool<uint16_t, uint16_t>(*s, team);
#endif
    run_over_pool<float, float>(*s, team);
}

void sessile_product(const Product* p) {
    Team team = p->openmp.team((int64_t*)p->counts);
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    if (p->inputs == INT8_INPUTS) return run_product<int8_t>(*p, team);
    if (p->inputs == BFLOAT16_INPUTS) return run_product<uint16_t>(*p, team);
#endif
    run_product<float>(*p, team);
}
}
