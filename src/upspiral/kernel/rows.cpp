// What a decoder layer does to each row by itself, between the products: RMS norm, rotation (RoPE), gated SiLU; each with its
// gradient. A row's results do not depend on other rows. Widths are multiples of 16 (of 32 for the rotation).
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "vectors.h"

namespace {

constexpr int64_t WORTH_A_TEAM = 1 << 16;  // elements; fewer are done sooner than other threads are woken

template <class E>
struct Rows {  // [tokens, heads, width], the last dimension without gaps
  E* data;
  int64_t token_stride, head_stride;
  E* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

struct Extent {
  int64_t tokens, heads, width;
  int64_t rows() const { return tokens * heads; }
  bool large() const { return rows() * width > WORTH_A_TEAM; }
};

// Rounded as it would be in memory.
template <class T>
__m512 rounded(__m512 x) {
  typename T::Element held[LANES];
  T::store(held, x);
  return T::load(held);
}

// to = weight * from / sqrt(mean(from^2) + epsilon), rounded before the weight as transformers does it.
template <class T>
void norm(const Extent& extent, Rows<const typename T::Element> from, const typename T::Element* weight, float epsilon, Rows<typename T::Element> to, float* scales) {
#pragma omp parallel for schedule(static) if (extent.large())
  for (int64_t row = 0; row < extent.rows(); ++row) {
    const auto* x = from.at(row / extent.heads, row % extent.heads);
    auto* y = to.at(row / extent.heads, row % extent.heads);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < extent.width; d += LANES) squares = _mm512_fmadd_ps(T::load(x + d), T::load(x + d), squares);
    scales[row] = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / extent.width + epsilon);
    const __m512 scale = _mm512_set1_ps(scales[row]);
    for (int64_t d = 0; d < extent.width; d += LANES)
      T::store(y + d, _mm512_mul_ps(T::load(weight + d), rounded<T>(_mm512_mul_ps(T::load(x + d), scale))));
  }
}

// Adds to `grad_weight`; `carried`, where given, is added to the gradient of the rows (what flows past the norm).
template <class T>
void norm_gradients(const Extent& extent, Rows<const typename T::Element> from, const typename T::Element* weight, const float* scales, Rows<const typename T::Element> grad, Rows<const typename T::Element> carried, Rows<typename T::Element> to, float* grad_weight) {
  const int threads = extent.large() ? omp_get_max_threads() : 1;
  std::unique_ptr<float[]> sums(new float[threads * extent.width]());
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    float* sum = sums.get() + thread * extent.width;
    for (int64_t row = extent.rows() * thread / threads; row < extent.rows() * (thread + 1) / threads; ++row) {
      const int64_t token = row / extent.heads, head = row % extent.heads;
      const auto *x = from.at(token, head), *g = grad.at(token, head);
      const __m512 scale = _mm512_set1_ps(scales[row]);
      __m512 common = _mm512_setzero_ps();
      for (int64_t d = 0; d < extent.width; d += LANES) {
        const __m512 normed = _mm512_mul_ps(T::load(x + d), scale), slope = T::load(g + d);
        common = _mm512_fmadd_ps(_mm512_mul_ps(slope, T::load(weight + d)), normed, common);
        _mm512_storeu_ps(sum + d, _mm512_fmadd_ps(slope, rounded<T>(normed), _mm512_loadu_ps(sum + d)));
      }
      common = _mm512_set1_ps(_mm512_reduce_add_ps(common) / extent.width);
      for (int64_t d = 0; d < extent.width; d += LANES) {
        const __m512 normed = _mm512_mul_ps(T::load(x + d), scale);
        __m512 slope = _mm512_mul_ps(T::load(g + d), T::load(weight + d));
        slope = _mm512_mul_ps(_mm512_fnmadd_ps(normed, common, slope), scale);
        if (carried.data) slope = _mm512_add_ps(slope, T::load(carried.at(token, head) + d));
        T::store(to.at(token, head) + d, slope);
      }
    }
  }
  for (int thread = 0; thread < threads; ++thread)
    for (int64_t d = 0; d < extent.width; ++d) grad_weight[d] += sums[thread * extent.width + d];
}

// Each half of a head turned by the token's angles; `sign` -1 turns back. May be done in place.
template <class T>
void rotate(const Extent& extent, Rows<const typename T::Element> from, const typename T::Element* cosines, const typename T::Element* sines, float sign, Rows<typename T::Element> to) {
  const int64_t half = extent.width / 2;
  const __m512 signs = _mm512_set1_ps(sign);
#pragma omp parallel for schedule(static) if (extent.large())
  for (int64_t row = 0; row < extent.rows(); ++row) {
    const int64_t token = row / extent.heads, head = row % extent.heads;
    const auto* x = from.at(token, head);
    auto* y = to.at(token, head);
    for (int64_t d = 0; d < half; d += LANES) {
      const __m512 first = T::load(x + d), second = T::load(x + half + d);
      const __m512 cosine = T::load(cosines + token * extent.width + d);
      const __m512 sine = _mm512_mul_ps(T::load(sines + token * extent.width + d), signs);
      T::store(y + d, _mm512_fnmadd_ps(second, sine, _mm512_mul_ps(first, cosine)));
      T::store(y + half + d, _mm512_fmadd_ps(first, sine, _mm512_mul_ps(second, cosine)));
    }
  }
}

// [tokens, 2 * width] of gates and what they let through -> [tokens, width]
template <class T>
void gate(const Extent& extent, const typename T::Element* from, typename T::Element* to) {
#pragma omp parallel for schedule(static) if (extent.large())
  for (int64_t token = 0; token < extent.tokens; ++token) {
    const auto* x = from + token * 2 * extent.width;
    for (int64_t d = 0; d < extent.width; d += LANES) {
      const __m512 gate = T::load(x + d);
      const __m512 opened = rounded<T>(_mm512_mul_ps(gate, sigmoid_of(gate)));
      T::store(to + token * extent.width + d, _mm512_mul_ps(opened, T::load(x + extent.width + d)));
    }
  }
}

template <class T>
void gate_gradients(const Extent& extent, const typename T::Element* from, const typename T::Element* grad, typename T::Element* to) {
#pragma omp parallel for schedule(static) if (extent.large())
  for (int64_t token = 0; token < extent.tokens; ++token) {
    const auto* x = from + token * 2 * extent.width;
    auto* out = to + token * 2 * extent.width;
    for (int64_t d = 0; d < extent.width; d += LANES) {
      const __m512 gate = T::load(x + d), up = T::load(x + extent.width + d), slope = T::load(grad + token * extent.width + d);
      const __m512 open = sigmoid_of(gate), opened = _mm512_mul_ps(gate, open);
      // d silu = sigmoid + silu (1 - sigmoid)
      const __m512 slant = _mm512_fmadd_ps(opened, _mm512_sub_ps(_mm512_set1_ps(1.0f), open), open);
      T::store(out + d, _mm512_mul_ps(_mm512_mul_ps(slope, up), slant));
      T::store(out + extent.width + d, _mm512_mul_ps(slope, opened));
    }
  }
}

template <class E>
Rows<E> rows_of(void* data, const int64_t* strides) {
  return {(E*)data, strides[0], strides[1]};
}

}  // namespace

// `strides`: of tokens and heads, in elements, one pair for each tensor of rows in the order of the arguments.
extern "C" {

#define FOR_ELEMENT(call)   \
  if (bfloat16) {           \
    using T = Bfloat16;     \
    using E = T::Element;   \
    call;                   \
  } else {                  \
    using T = Float32;      \
    using E = T::Element;   \
    call;                   \
  }

void norm_rows(int bfloat16, const Extent* extent, void* from, void* weight, float epsilon, void* to, float* scales, const int64_t* strides) {
  FOR_ELEMENT(norm<T>(*extent, rows_of<const E>(from, strides), (const E*)weight, epsilon, rows_of<E>(to, strides + 2), scales))
}

void norm_rows_gradients(int bfloat16, const Extent* extent, void* from, void* weight, const float* scales, void* grad, void* carried, void* to, float* grad_weight, const int64_t* strides) {
  FOR_ELEMENT(norm_gradients<T>(*extent, rows_of<const E>(from, strides), (const E*)weight, scales, rows_of<const E>(grad, strides + 2), rows_of<const E>(carried, strides + 4), rows_of<E>(to, strides + 6), grad_weight))
}

void rotate_rows(int bfloat16, const Extent* extent, void* from, void* cosines, void* sines, float sign, void* to, const int64_t* strides) {
  FOR_ELEMENT(rotate<T>(*extent, rows_of<const E>(from, strides), (const E*)cosines, (const E*)sines, sign, rows_of<E>(to, strides + 2)))
}

void gate_rows(int bfloat16, const Extent* extent, void* from, void* to) {
  FOR_ELEMENT(gate<T>(*extent, (const E*)from, (E*)to))
}

void gate_rows_gradients(int bfloat16, const Extent* extent, void* from, void* grad, void* to) {
  FOR_ELEMENT(gate_gradients<T>(*extent, (const E*)from, (const E*)grad, (E*)to))
}
}
