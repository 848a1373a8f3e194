// Attention in which each query sees the tokens of its own path: forward and backward, bfloat16 or float32.
//
// A path is a list of runs of keys, from the root down. Queries come in tasks: neighbouring tokens of one path, the first
// at `first_position` of it. The query heads that share a key head lie side by side: column c of a task is its token
// c / group and the group's head c % group. Scores are computed transposed, keys by columns, so that what each product
// makes is what the next one reads, and a softmax runs along vectors.
//
// Keys are taken in tiles of TILE, counted from the root of the path, whatever runs they stand in. Every number of a
// query is therefore added up in an order that depends on its path alone: how queries are cut into tasks, and what else is
// computed beside them, changes no bit.
//
// As in FlashAttention (arXiv 2205.14135, 2307.08691): softmax online, probabilities computed again in the backward pass.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

constexpr int TILE = 64;  // keys of a tile, and the most columns of a task
constexpr int MOST_WIDTH = 256;
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = 4;  // 24 sums, 4 operands and a broadcast fill the 32 registers

struct Task {
  int64_t first_token, tokens, first_run, end_run, first_position;
};

struct Run {
  int64_t start, length;
};

// ---- products

template <class T, int ROWS, int VECTORS>
inline void product_block(float* c, int ldc, const typename T::Element* a, int64_t lda, const typename T::Element* b, int ldb, int steps, bool add) {
  __m512 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = add ? _mm512_loadu_ps(c + r * ldc + v * LANES) : _mm512_setzero_ps();
  for (int k = 0; k < steps; ++k) {
    __m512i right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_si512(b + (int64_t)k * ldb + v * LANES * T::PACK);
    for (int r = 0; r < ROWS; ++r) {
      int32_t both;
      std::memcpy(&both, a + r * lda + k * T::PACK, 4);
      const __m512i left = _mm512_set1_epi32(both);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = T::multiply_add(sums[r][v], left, right[v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * ldc + v * LANES, sums[r][v]);
}

template <class T, int VECTORS>
inline void product_panel(float* c, int ldc, const typename T::Element* a, int64_t lda, const typename T::Element* b, int ldb, int rows, int steps, bool add) {
  for (; rows >= BLOCK_ROWS; rows -= BLOCK_ROWS, a += BLOCK_ROWS * lda, c += BLOCK_ROWS * ldc)
    product_block<T, BLOCK_ROWS, VECTORS>(c, ldc, a, lda, b, ldb, steps, add);
  switch (rows) {
    case 5: return product_block<T, 5, VECTORS>(c, ldc, a, lda, b, ldb, steps, add);
    case 4: return product_block<T, 4, VECTORS>(c, ldc, a, lda, b, ldb, steps, add);
    case 3: return product_block<T, 3, VECTORS>(c, ldc, a, lda, b, ldb, steps, add);
    case 2: return product_block<T, 2, VECTORS>(c, ldc, a, lda, b, ldb, steps, add);
    case 1: return product_block<T, 1, VECTORS>(c, ldc, a, lda, b, ldb, steps, add);
  }
}

// c[rows, vectors * LANES] (+)= a[rows, steps * PACK] b, where b is packed: [steps, columns, PACK], `ldb` elements a step.
template <class T>
void product(float* c, int ldc, const typename T::Element* a, int64_t lda, const typename T::Element* b, int ldb, int rows, int vectors, int steps, bool add) {
  for (; vectors >= BLOCK_VECTORS; vectors -= BLOCK_VECTORS, b += BLOCK_VECTORS * LANES * T::PACK, c += BLOCK_VECTORS * LANES)
    product_panel<T, BLOCK_VECTORS>(c, ldc, a, lda, b, ldb, rows, steps, add);
  switch (vectors) {
    case 3: return product_panel<T, 3>(c, ldc, a, lda, b, ldb, rows, steps, add);
    case 2: return product_panel<T, 2>(c, ldc, a, lda, b, ldb, rows, steps, add);
    case 1: return product_panel<T, 1>(c, ldc, a, lda, b, ldb, rows, steps, add);
  }
}

// ---- what a call is given

template <class E>
struct Heads {  // [heads, tokens, width], the last dimension without gaps
  const E* data;
  int64_t head_stride, token_stride;
  const E* at(int64_t head, int64_t token) const { return data + head * head_stride + token * token_stride; }
};

struct Shape {
  int64_t query_heads, key_heads, tokens, keys, width;
  float scale;
  int group() const { return (int)(query_heads / key_heads); }
};

template <class E>
struct Transposed {  // [heads, width, keys], each row with room for what a tile reads beyond its end
  Transposed(const Shape& shape, const Heads<E>& heads)
      // An odd number of cache lines a row: rows that are powers of two apart would meet in the same few places.
      : stride((shape.keys + TILE) / 64 * 64 + 32), data(new E[shape.key_heads * shape.width * stride]), width(shape.width) {
    const int64_t blocks = (stride + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t head = 0; head < shape.key_heads; ++head)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * TILE, end = std::min(begin + TILE, stride), filled = std::min(end, shape.keys);
        E* to = data.get() + head * width * stride;
        for (int64_t d = 0; d < width; ++d) {
          for (int64_t n = begin; n < filled; ++n) to[d * stride + n] = heads.at(head, n)[d];
          for (int64_t n = std::max(begin, shape.keys); n < end; ++n) to[d * stride + n] = 0;
        }
      }
  }
  const E* at(int64_t head, int64_t key) const { return data.get() + head * width * stride + key; }

  int64_t stride;
  std::unique_ptr<E[]> data;
  int64_t width;
};

// ---- a path, tile by tile

struct Piece {  // rows [row, row + count) of a tile are keys [key, key + count)
  int64_t key;
  int row, count;
};

class Path {
 public:
  Path(const Run* first, int64_t length) : run_(first), left_(length) {}

  // The pieces of the next tile; their number, 0 at the end.
  int next(Piece (&pieces)[TILE]) {
    int filled = 0, count = 0;
    while (filled < TILE && left_ > 0) {
      const int64_t here = std::min({run_->length - used_, (int64_t)(TILE - filled), left_});
      if (here > 0) pieces[count++] = {run_->start + used_, filled, (int)here};
      used_ += here, left_ -= here, filled += (int)here;
      if (used_ == run_->length) ++run_, used_ = 0;
    }
    rows = filled;
    return count;
  }

  int rows = 0;

 private:
  const Run* run_;
  int64_t left_, used_ = 0;
};

// Columns [0, width) of a transposed tile: in place where it is one piece, else put together in `scratch`.
template <class E>
const E* transposed_tile(const Transposed<E>& all, int64_t head, const Piece* pieces, int count, E* scratch, int64_t* stride) {
  if (count == 1) {
    *stride = all.stride;
    return all.at(head, pieces[0].key);
  }
  const int filled = pieces[count - 1].row + pieces[count - 1].count;
  for (int64_t d = 0; d < all.width; ++d) {
    for (int i = 0; i < count; ++i)
      std::memcpy(scratch + d * TILE + pieces[i].row, all.at(head, pieces[i].key) + d * all.stride, pieces[i].count * sizeof(E));
    if (filled < TILE) scratch[d * TILE + filled] = 0;
  }
  *stride = TILE;
  return scratch;
}

// ---- the columns of a task

template <class T>
struct Columns {
  using E = typename T::Element;

  Columns(const Task& task, const Shape& shape, int64_t key_head)
      : first_head(key_head * shape.group()), group(shape.group()), count((int)task.tokens * group), vectors((count + LANES - 1) / LANES), task_(task) {
    for (int c = 0; c < vectors * LANES; ++c) positions[c] = (int32_t)(task.first_position + token_of(std::min(c, count - 1)));
  }
  int stride() const { return vectors * LANES; }
  int64_t token_of(int column) const { return column / group; }
  int64_t token(int column) const { return task_.first_token + column / group; }
  int64_t head(int column) const { return first_head + column % group; }

  // Packed for a sum over the width: [width / PACK, columns, PACK]; columns that only fill up are zero.
  void pack_over_width(const Heads<E>& from, int64_t width, E* to) const {
    std::memset(to, 0, width * stride() * sizeof(E));
    for (int c = 0; c < count; ++c) {
      const E* row = from.at(head(c), token(c));
      for (int64_t d = 0; d < width; d += T::PACK) std::memcpy(to + d * stride() + c * T::PACK, row + d, 4);
    }
  }
  // Packed for a sum over the columns: [columns / PACK, width, PACK].
  void pack_over_columns(const Heads<E>& from, int64_t width, E* to) const {
    for (int c = 0; c < stride(); ++c) {
      const E* row = c < count ? from.at(head(c), token(c)) : nullptr;
      E* out = to + c / T::PACK * width * T::PACK + c % T::PACK;
      for (int64_t d = 0; d < width; ++d) out[d * T::PACK] = row ? row[d] : E(0);
    }
  }
  // Of a product [width, columns], column by column times `factors`, to [tokens, heads, width].
  void unpack(const float* from, const float* factors, int64_t width, int64_t heads, E* to) const {
    const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(stride()));
    for (int c = 0; c < count; ++c) {
      E* out = to + (token(c) * heads + head(c)) * width;
      const __m512 factor = _mm512_set1_ps(factors ? factors[c] : 1.0f);
      for (int64_t d = 0; d < width; d += LANES) T::store(out + d, _mm512_mul_ps(_mm512_i32gather_ps(rows, from + d * stride() + c, 4), factor));
    }
  }
  // Which columns of a vector see the key at a position.
  __mmask16 sees(int vector, int64_t position) const {
    return _mm512_cmp_epi32_mask(_mm512_set1_epi32((int32_t)position), _mm512_load_si512(positions + vector * LANES), _MM_CMPINT_LE);
  }

  int64_t first_head;
  int group, count, vectors;
  alignas(64) int32_t positions[TILE];

 private:
  const Task& task_;
};

// Writes one vector of rows n and n + 1 (nothing if `second` is beyond the tile) packed for a sum over rows.
template <class T>
void store_packed(typename T::Element* to, int stride, int row, int vector, __m512 first, __m512 second) {
  if constexpr (T::PACK == 2) {
    T::store_pair(to + row * stride + vector * LANES * 2, first, second);
  } else {
    T::store(to + row * stride + vector * LANES, first);
    T::store(to + (row + 1) * stride + vector * LANES, second);
  }
}

// ---- forward

template <class T>
class Forward {
  using E = typename T::Element;

 public:
  Forward(const Shape& shape, const Heads<E>& queries, const Heads<E>& keys, const Heads<E>& values)
      : shape_(shape), queries_(queries), keys_(keys), values_(shape, values) {}

  void run(const Task* tasks, int64_t count, const Run* runs, E* output, float* lse) const {
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t head = 0; head < shape_.key_heads; ++head)
      for (int64_t i = 0; i < count; ++i) attend(tasks[i], runs, head, output, lse);
  }

 private:
  void attend(const Task& task, const Run* runs, int64_t key_head, E* output, float* lse) const {
    const Columns<T> columns(task, shape_, key_head);
    const int width = (int)shape_.width, stride = columns.stride();
    alignas(64) E query[MOST_WIDTH * TILE], weights[TILE * TILE], scratch[MOST_WIDTH * TILE];
    alignas(64) float scores[TILE * TILE], sums[MOST_WIDTH * TILE], top[TILE], total[TILE];
    columns.pack_over_width(queries_, width, query);
    std::fill(top, top + TILE, -INFINITY);
    std::fill(total, total + TILE, 0.0f);
    Path path(runs + task.first_run, task.first_position + task.tokens);
    Piece pieces[TILE];
    int64_t position = 0;
    for (int count; (count = path.next(pieces)) > 0; position += path.rows) {
      for (int i = 0; i < count; ++i)
        product<T>(scores + pieces[i].row * stride, stride, keys_.at(key_head, pieces[i].key), keys_.token_stride, query, stride * T::PACK, pieces[i].count, columns.vectors, width / T::PACK, false);
      soften(columns, position, path.rows, scores, weights, sums, top, total);
      int64_t value_stride;
      const E* values = transposed_tile(values_, key_head, pieces, count, scratch, &value_stride);
      product<T>(sums, stride, values, value_stride, weights, stride * T::PACK, width, columns.vectors, (path.rows + T::PACK - 1) / T::PACK, position > 0);
    }
    for (int c = 0; c < columns.count; ++c) {
      lse[columns.head(c) * shape_.tokens + columns.token(c)] = top[c] + std::log(total[c]);
      total[c] = 1.0f / total[c];
    }
    columns.unpack(sums, total, width, shape_.query_heads, output);
  }

  // Scores of one tile to packed weights; what is summed so far shrinks to the new maximum.
  void soften(const Columns<T>& columns, int64_t position, int rows, const float* scores, E* weights, float* sums, float* top, float* total) const {
    const int stride = columns.stride();
    const __m512 scale = _mm512_set1_ps(shape_.scale);
    for (int v = 0; v < columns.vectors; ++v) {
      const float* column = scores + v * LANES;
      const __m512 before = _mm512_load_ps(top + v * LANES);
      __m512 now = before;
      for (int n = 0; n < rows; ++n) now = _mm512_mask_max_ps(now, columns.sees(v, position + n), now, _mm512_mul_ps(_mm512_loadu_ps(column + n * stride), scale));
      const __m512 shrink = exp_of(_mm512_sub_ps(before, now));
      __m512 parts[LANES];
      for (__m512& part : parts) part = _mm512_setzero_ps();
      for (int n = 0; n < rows; n += 2) {
        __m512 pair[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int i = 0; i < 2 && n + i < rows; ++i) {
          const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(column + (n + i) * stride), scale);
          pair[i] = _mm512_maskz_mov_ps(columns.sees(v, position + n + i), exp_of(_mm512_sub_ps(score, now)));
          parts[(n + i) % LANES] = _mm512_add_ps(parts[(n + i) % LANES], pair[i]);
        }
        store_packed<T>(weights, stride, n, v, pair[0], pair[1]);
      }
      for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] = _mm512_add_ps(parts[i], parts[i + half]);
      _mm512_store_ps(top + v * LANES, now);
      _mm512_store_ps(total + v * LANES, _mm512_fmadd_ps(_mm512_load_ps(total + v * LANES), shrink, parts[0]));
      if (position > 0 && _mm512_cmp_ps_mask(before, now, _CMP_LT_OQ))
        for (int64_t d = 0; d < shape_.width; ++d) {
          float* at = sums + d * stride + v * LANES;
          _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
        }
    }
  }

  const Shape& shape_;
  Heads<E> queries_, keys_;
  Transposed<E> values_;
};

// ---- one query a sequence

// What a decoding engine asks for: the same numbers as `Forward`, to the bit, with the lanes of a vector along the keys
// where those run along the queries there; a few queries do not fill a vector.
template <class T>
class Decode {
  using E = typename T::Element;

 public:
  Decode(const Shape& shape, const Heads<E>& queries, const E* keys, const E* values, const int64_t* strides)
      : shape_(shape), queries_(queries), keys_(keys), values_(values), slot_stride_(strides[0]), head_stride_(strides[1]), token_stride_(strides[2]) {}

  void run(const int64_t* slots, const int64_t* lengths, E* output) const {
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t sequence = 0; sequence < shape_.tokens; ++sequence)
      for (int64_t head = 0; head < shape_.key_heads; ++head)
        for (int first = 0; first < shape_.group(); first += MOST_QUERIES)
          attend(sequence, head, first, slots[sequence], lengths[sequence], output);
  }

 private:
  static constexpr int MOST_QUERIES = 4;

  struct State {
    alignas(64) float sums[MOST_QUERIES][MOST_WIDTH], scores[MOST_QUERIES][TILE];
    alignas(64) E weights[MOST_QUERIES][TILE], query[MOST_QUERIES][MOST_WIDTH];
    float top[MOST_QUERIES], total[MOST_QUERIES];
  };

  void attend(int64_t sequence, int64_t key_head, int first, int64_t slot, int64_t length, E* output) const {
    const int count = std::min(shape_.group() - first, MOST_QUERIES);
    const int64_t head = key_head * shape_.group() + first, at = slot * slot_stride_ + key_head * head_stride_;
    State state;
    for (int m = 0; m < MOST_QUERIES; ++m) {
      std::memcpy(state.query[m], queries_.at(head + std::min(m, count - 1), sequence), shape_.width * sizeof(E));
      std::memset(state.sums[m], 0, shape_.width * sizeof(float));
      state.top[m] = -INFINITY, state.total[m] = 0;
    }
    for (int64_t position = 0; position < length; position += TILE) {
      const int rows = (int)std::min<int64_t>(TILE, length - position);
      for (int n = 0; n < rows; n += LANES) {
        const int64_t here = at + (position + n) * token_stride_;
        fetch(keys_ + here + LANES * token_stride_, (int)std::min<int64_t>(LANES, length - position - n - LANES));
        fetch(values_ + here, std::min(LANES, rows - n));
        score(state, keys_ + here, n, std::min(LANES, rows - n));
      }
      soften(state, rows);
      for (int64_t d = 0; d < shape_.width; d += 2 * LANES)
        add_values(state, values_ + at + position * token_stride_ + d, rows, (int)d, d + LANES < shape_.width);
    }
    for (int m = 0; m < count; ++m) {
      const __m512 factor = _mm512_set1_ps(1.0f / state.total[m]);
      E* out = output + (sequence * shape_.query_heads + head + m) * shape_.width;
      for (int64_t d = 0; d < shape_.width; d += LANES) T::store(out + d, _mm512_mul_ps(_mm512_load_ps(state.sums[m] + d), factor));
    }
  }

  // Asks memory for rows that will be read soon: they lie in many places, each too short for a processor to see a pattern.
  void fetch(const E* from, int rows) const {
    for (int i = 0; i < rows; ++i)
      for (int64_t d = 0; d < shape_.width; d += 64 / sizeof(E)) _mm_prefetch((const char*)(from + i * token_stride_ + d), _MM_HINT_T0);
  }

  // Scores of keys n .. n + LANES, of which `rows` are there.
  void score(State& state, const E* keys, int n, int rows) const {
    __m512 sums[MOST_QUERIES];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < shape_.width; d += LANES * T::PACK) {
      const int words = (int)std::min<int64_t>(LANES, (shape_.width - d) / T::PACK);
      const __mmask16 wanted = (__mmask16)((1u << words) - 1);
      __m512i block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = i < rows ? _mm512_maskz_loadu_epi32(wanted, keys + i * token_stride_ + d) : _mm512_setzero_si512();
      transpose(block);
      for (int k = 0; k < words; ++k)
        for (int m = 0; m < MOST_QUERIES; ++m) {
          int32_t both;
          std::memcpy(&both, state.query[m] + d + k * T::PACK, 4);
          sums[m] = T::multiply_add(sums[m], block[k], _mm512_set1_epi32(both));
        }
    }
    for (int m = 0; m < MOST_QUERIES; ++m) _mm512_store_ps(state.scores[m] + n, _mm512_mul_ps(sums[m], _mm512_set1_ps(shape_.scale)));
  }

  void soften(State& state, int rows) const {
    for (int m = 0; m < MOST_QUERIES; ++m) {
      const auto there = [&](int n) { return (__mmask16)(rows - n >= LANES ? 0xffff : (1u << std::max(rows - n, 0)) - 1); };
      __m512 most = _mm512_set1_ps(state.top[m]);
      for (int n = 0; n < TILE; n += LANES) most = _mm512_mask_max_ps(most, there(n), most, _mm512_load_ps(state.scores[m] + n));
      const float now = _mm512_reduce_max_ps(most);
      __m512 parts = _mm512_setzero_ps();
      for (int n = 0; n < TILE; n += LANES) {
        const __m512 weight = _mm512_maskz_mov_ps(there(n), exp_of(_mm512_sub_ps(_mm512_load_ps(state.scores[m] + n), _mm512_set1_ps(now))));
        T::store(state.weights[m] + n, weight);
        parts = _mm512_add_ps(parts, weight);
      }
      alignas(64) float halves[LANES];
      _mm512_store_ps(halves, parts);
      for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) halves[i] += halves[i + half];
      const float shrink = _mm512_cvtss_f32(exp_of(_mm512_set1_ps(state.top[m] - now)));
      state.total[m] = std::fma(state.total[m], shrink, halves[0]);
      if (state.top[m] < now)
        for (int64_t d = 0; d < shape_.width; d += LANES)
          _mm512_store_ps(state.sums[m] + d, _mm512_mul_ps(_mm512_load_ps(state.sums[m] + d), _mm512_set1_ps(shrink)));
      state.top[m] = now;
    }
  }

  // Adds the weighted values of one tile to dimensions d .. d + 2 * LANES, or half of them.
  void add_values(State& state, const E* values, int rows, int d, bool both) const {
    __m512 low[MOST_QUERIES], high[MOST_QUERIES];
    for (int m = 0; m < MOST_QUERIES; ++m) low[m] = _mm512_load_ps(state.sums[m] + d), high[m] = both ? _mm512_load_ps(state.sums[m] + d + LANES) : _mm512_setzero_ps();
    for (int n = 0; n < rows; n += T::PACK) {
      const E *first = values + n * token_stride_, *second = T::PACK == 2 && n + 1 < rows ? first + token_stride_ : first;
      const __m512i left = T::interleaved(first, second), right = both ? T::interleaved(first + LANES, second + LANES) : left;
      for (int m = 0; m < MOST_QUERIES; ++m) {
        int32_t weights;
        std::memcpy(&weights, state.weights[m] + n, 4);
        low[m] = T::multiply_add(low[m], _mm512_set1_epi32(weights), left);
        high[m] = T::multiply_add(high[m], _mm512_set1_epi32(weights), right);
      }
    }
    for (int m = 0; m < MOST_QUERIES; ++m) {
      _mm512_store_ps(state.sums[m] + d, low[m]);
      if (both) _mm512_store_ps(state.sums[m] + d + LANES, high[m]);
    }
  }

  const Shape& shape_;
  Heads<E> queries_;
  const E *keys_, *values_;
  int64_t slot_stride_, head_stride_, token_stride_;
};

// ---- backward

template <class E>
struct Saved {
  Heads<E> queries, keys, values, output, grad;
  const float* lse;
};

template <class T>
class Backward {
  using E = typename T::Element;

 public:
  Backward(const Shape& shape, const Saved<E>& saved) : shape_(shape), saved_(saved), keys_(shape, saved.keys) {}

  // Gradients of keys and values are [key heads, keys, width] in float32, and start at zero; each thread adds up those of
  // its tasks, and the threads' sums are added in their order.
  void run(const Task* tasks, int64_t count, const Run* runs, E* grad_query, float* grad_keys, float* grad_values) const {
    const int threads = (int)std::min<int64_t>(omp_get_max_threads(), count);
    const int64_t size = shape_.key_heads * shape_.keys * shape_.width;
    std::vector<std::unique_ptr<float[]>> others(std::max(threads - 1, 0));
    for (auto& other : others) other.reset(new float[2 * size]());
    const std::vector<int64_t> bounds = shares(tasks, count, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
      float* own_keys = thread ? others[thread - 1].get() : grad_keys;
      float* own_values = thread ? others[thread - 1].get() + size : grad_values;
      for (int64_t head = 0; head < shape_.key_heads; ++head)
        for (int64_t i = bounds[thread]; i < bounds[thread + 1]; ++i)
          differentiate(tasks[i], runs, head, grad_query, own_keys, own_values);
    }
    for (const auto& other : others)
      for (int64_t i = 0; i < size; ++i) grad_keys[i] += other[i], grad_values[i] += other[size + i];
  }

 private:
  // Bounds of parts of the tasks that are about equal in work.
  static std::vector<int64_t> shares(const Task* tasks, int64_t count, int threads) {
    const auto work = [&](int64_t i) { return tasks[i].first_position + tasks[i].tokens + TILE; };
    int64_t total = 0, done = 0;
    for (int64_t i = 0; i < count; ++i) total += work(i);
    std::vector<int64_t> bounds{0};
    for (int64_t i = 0; i < count; ++i) {
      if (done * threads >= total * (int64_t)bounds.size()) bounds.push_back(i);
      done += work(i);
    }
    bounds.resize(threads + 1, count);
    return bounds;
  }

  void differentiate(const Task& task, const Run* runs, int64_t key_head, E* grad_query, float* grad_keys, float* grad_values) const {
    const Columns<T> columns(task, shape_, key_head);
    const int width = (int)shape_.width, stride = columns.stride(), vectors = width / LANES;
    alignas(64) E query[MOST_WIDTH * TILE], grad[MOST_WIDTH * TILE], query_rows[MOST_WIDTH * TILE], grad_rows[MOST_WIDTH * TILE];
    alignas(64) E weights[TILE * TILE], slopes[TILE * TILE], packed_slopes[TILE * TILE], scratch[MOST_WIDTH * TILE];
    alignas(64) float scores[TILE * TILE], grad_weights[TILE * TILE], sums[MOST_WIDTH * TILE], lse[TILE], delta[TILE];
    columns.pack_over_width(saved_.queries, width, query);
    columns.pack_over_width(saved_.grad, width, grad);
    columns.pack_over_columns(saved_.queries, width, query_rows);
    columns.pack_over_columns(saved_.grad, width, grad_rows);
    read_statistics(columns, lse, delta);
    Path path(runs + task.first_run, task.first_position + task.tokens);
    Piece pieces[TILE];
    int64_t position = 0;
    for (int count; (count = path.next(pieces)) > 0; position += path.rows) {
      for (int i = 0; i < count; ++i) {
        const Piece& piece = pieces[i];
        product<T>(scores + piece.row * stride, stride, saved_.keys.at(key_head, piece.key), saved_.keys.token_stride, query, stride * T::PACK, piece.count, columns.vectors, width / T::PACK, false);
        product<T>(grad_weights + piece.row * stride, stride, saved_.values.at(key_head, piece.key), saved_.values.token_stride, grad, stride * T::PACK, piece.count, columns.vectors, width / T::PACK, false);
      }
      slope(columns, position, path.rows, scores, grad_weights, lse, delta, weights, slopes, packed_slopes);
      for (int i = 0; i < count; ++i) {
        const Piece& piece = pieces[i];
        const int64_t at = (key_head * shape_.keys + piece.key) * width;
        product<T>(grad_values + at, width, weights + piece.row * stride, stride, grad_rows, width * T::PACK, piece.count, vectors, stride / T::PACK, true);
        product<T>(grad_keys + at, width, slopes + piece.row * stride, stride, query_rows, width * T::PACK, piece.count, vectors, stride / T::PACK, true);
      }
      int64_t key_stride;
      const E* keys = transposed_tile(keys_, key_head, pieces, count, scratch, &key_stride);
      product<T>(sums, stride, keys, key_stride, packed_slopes, stride * T::PACK, width, columns.vectors, (path.rows + T::PACK - 1) / T::PACK, position > 0);
    }
    columns.unpack(sums, nullptr, width, shape_.query_heads, grad_query);
  }

  // Of each column the log-sum-exp, and what all its slopes have in common: grad . output.
  void read_statistics(const Columns<T>& columns, float* lse, float* delta) const {
    std::fill(lse, lse + TILE, 0.0f);
    std::fill(delta, delta + TILE, 0.0f);
    for (int c = 0; c < columns.count; ++c) {
      const int64_t head = columns.head(c), token = columns.token(c);
      const E *grad = saved_.grad.at(head, token), *output = saved_.output.at(head, token);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < shape_.width; d += LANES) sum = _mm512_fmadd_ps(T::load(grad + d), T::load(output + d), sum);
      lse[c] = saved_.lse[head * shape_.tokens + token];
      delta[c] = _mm512_reduce_add_ps(sum);
    }
  }

  // Scores and gradients of the weights of one tile to weights and gradients of the scores.
  void slope(const Columns<T>& columns, int64_t position, int rows, const float* scores, const float* grad_weights, const float* lse, const float* delta, E* weights, E* slopes, E* packed_slopes) const {
    const int stride = columns.stride();
    const __m512 scale = _mm512_set1_ps(shape_.scale);
    for (int v = 0; v < columns.vectors; ++v) {
      const __m512 own_lse = _mm512_load_ps(lse + v * LANES), own_delta = _mm512_load_ps(delta + v * LANES);
      for (int n = 0; n < rows; n += 2) {
        __m512 pair[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int i = 0; i < 2 && n + i < rows; ++i) {
          const int at = (n + i) * stride + v * LANES;
          const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + at), scale);
          const __m512 weight = _mm512_maskz_mov_ps(columns.sees(v, position + n + i), exp_of(_mm512_sub_ps(score, own_lse)));
          pair[i] = _mm512_mul_ps(_mm512_mul_ps(weight, _mm512_sub_ps(_mm512_loadu_ps(grad_weights + at), own_delta)), scale);
          T::store(weights + at, weight);
          T::store(slopes + at, pair[i]);
        }
        store_packed<T>(packed_slopes, stride, n, v, pair[0], pair[1]);
      }
    }
  }

  const Shape& shape_;
  const Saved<E>& saved_;
  Transposed<E> keys_;
};

template <class T>
void forward(const Shape& shape, const Task* tasks, int64_t count, const Run* runs, const void* const* tensors, const int64_t* strides, void* output, float* lse) {
  using E = typename T::Element;
  const auto heads = [&](int i) { return Heads<E>{(const E*)tensors[i], strides[2 * i], strides[2 * i + 1]}; };
  Forward<T>(shape, heads(0), heads(1), heads(2)).run(tasks, count, runs, (E*)output, lse);
}

template <class T>
void decode(const Shape& shape, const void* const* tensors, const int64_t* strides, const int64_t* slots, const int64_t* lengths, void* output) {
  using E = typename T::Element;
  const Heads<E> queries{(const E*)tensors[0], strides[0], strides[1]};
  Decode<T>(shape, queries, (const E*)tensors[1], (const E*)tensors[2], strides + 2).run(slots, lengths, (E*)output);
}

template <class T>
void backward(const Shape& shape, const Task* tasks, int64_t count, const Run* runs, const void* const* tensors, const int64_t* strides, const float* lse, void* grad_query, float* grad_keys, float* grad_values) {
  using E = typename T::Element;
  const auto heads = [&](int i) { return Heads<E>{(const E*)tensors[i], strides[2 * i], strides[2 * i + 1]}; };
  const Saved<E> saved{heads(0), heads(1), heads(2), heads(3), heads(4), lse};
  Backward<T>(shape, saved).run(tasks, count, runs, (E*)grad_query, grad_keys, grad_values);
}

}  // namespace

// `tensors` and `strides` (of heads and of tokens, in elements): queries, keys, values; for the gradients also output and
// its gradient. Output and the queries' gradients are [tokens, query heads, width], lse is [query heads, tokens].
extern "C" {

void path_attention(int bfloat16, const Shape* shape, const Task* tasks, int64_t count, const Run* runs, const void* const* tensors, const int64_t* strides, void* output, float* lse) {
  (bfloat16 ? forward<Bfloat16> : forward<Float32>)(*shape, tasks, count, runs, tensors, strides, output, lse);
}

// `strides`: of heads and of sequences of the queries; of slots, heads and tokens of keys and values alike.
void decode_attention(int bfloat16, const Shape* shape, const void* const* tensors, const int64_t* strides, const int64_t* slots, const int64_t* lengths, void* output) {
  (bfloat16 ? decode<Bfloat16> : decode<Float32>)(*shape, tensors, strides, slots, lengths, output);
}

void path_attention_gradients(int bfloat16, const Shape* shape, const Task* tasks, int64_t count, const Run* runs, const void* const* tensors, const int64_t* strides, const float* lse, void* grad_query, float* grad_keys, float* grad_values) {
  (bfloat16 ? backward<Bfloat16> : backward<Float32>)(*shape, tasks, count, runs, tensors, strides, lse, grad_query, grad_keys, grad_values);
}
}
