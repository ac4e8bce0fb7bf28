// Multi-query attention pooling of frames that stay where they lie; called from cpu_pooling.py through XLA's FFI.
//
// A clip's frames are read once for scores and pooling and once for the gradient, clip by clip, so that what is read
// twice in between lies in the cache of a core. Nothing as large as frames is written: a dropout mask scales probes and
// gradients in their place. One thread works on a call; a study has a member for every core.
//
// Every sum over values of a frame runs over the lanes of a vector and these in pairs, whatever else is summed up
// beside it, so that a clip's bits depend on neither its neighbours nor its place.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX__)
#define MER_JAX_KEEP(vector) asm("" : "+v"(vector))  // in a register, not read again by every product
#else
#define MER_JAX_KEEP(vector)
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kFrames = 3, kQueries = 8;  // of a tile of sums, which fill 24 of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kFrames = 3, kQueries = 4;  // 12 of 16
#else
constexpr int kVectorBytes = 16;
constexpr int kFrames = 3, kQueries = 4;
#endif
constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kChunk = 256;  // values of probes and frames that lie in the first cache together
constexpr int kAcross = 2;   // vectors of probes' gradients in a tile
constexpr float kMaskedScore = -1e30f;

template <int kBytes>
struct VectorOf {
  typedef float Type __attribute__((vector_size(kBytes)));
};
using Vector = VectorOf<kVectorBytes>::Type;

#if defined(__AVX512F__)
inline __mmask16 first(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }
inline Vector load_some(const float* from, int lanes) { return _mm512_maskz_loadu_ps(first(lanes), from); }
inline void store_some(float* to, Vector vector, int lanes) { _mm512_mask_storeu_ps(to, first(lanes), vector); }
#elif defined(__AVX__)
inline __m256i first(int lanes) {
  static const std::int32_t kMasks[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + kLanes - lanes));
}
inline Vector load_some(const float* from, int lanes) { return _mm256_maskload_ps(from, first(lanes)); }
inline void store_some(float* to, Vector vector, int lanes) { _mm256_maskstore_ps(to, first(lanes), vector); }
#else
inline Vector load_some(const float* from, int lanes) {
  Vector vector = {};
  std::memcpy(&vector, from, lanes * sizeof(float));
  return vector;
}
inline void store_some(float* to, Vector vector, int lanes) { std::memcpy(to, &vector, lanes * sizeof(float)); }
#endif

// The first `lanes` values that lie at `from`, and zeros.
inline Vector load(const float* from, int lanes) {
  if (lanes < kLanes) return load_some(from, lanes);
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

inline void store(float* to, Vector vector, int lanes) {
  if (lanes < kLanes)
    store_some(to, vector, lanes);
  else
    std::memcpy(to, &vector, sizeof(Vector));
}

// The sum of all lanes, of halves upon halves.
template <int kBytes = kVectorBytes>
inline float total(typename VectorOf<kBytes>::Type vector) {
  if constexpr (kBytes == 8) {
    return vector[0] + vector[1];
  } else {
    typename VectorOf<kBytes / 2>::Type low, high;
    std::memcpy(&low, &vector, kBytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + kBytes / 2, kBytes / 2);
    return total<kBytes / 2>(low + high);
  }
}

// exp(x) for x <= 0, to two last bits; 0 below -87. The same whatever the standard library.
inline float exponential(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;  // what is no number stays so
  constexpr float kShift = 12582912.0f;           // 1.5 2^23: adding it rounds to whole numbers
  const float shifted = bounded * 1.44269504f + kShift;
  const float whole = shifted - kShift;
  const float rest = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;
  float power = 1.98412698e-4f;  // Taylor's, to the seventh power of at most ln(2) / 2
  power = power * rest + 1.38888889e-3f;
  power = power * rest + 8.33333333e-3f;
  power = power * rest + 4.16666667e-2f;
  power = power * rest + 1.66666667e-1f;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(bits) << 23) + 0x3f800000;  // 2^whole
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : power * scale;
}

struct Shape {
  int samples, frames, width, queries;  // B, T, D, Q
};

// Adds products of kT frames with kQ probes to their sums, over `width` values, and has the values `ahead` of them
// fetched into the second cache: a clip's are too short a stream for a core to guess.
template <int kT, int kQ>
void add_products(const float* frames, std::size_t frame_step, std::ptrdiff_t ahead, const float* probes,
                  std::size_t probe_step, int width, Vector* sums, std::size_t sum_step) {
  Vector tile[kT][kQ];
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) tile[t][q] = sums[t * sum_step + q];
  const auto step = [&](int d, int lanes) __attribute__((always_inline)) {
    Vector frame[kT];
#pragma GCC unroll 8
    for (int t = 0; t < kT; ++t) {
      frame[t] = load(frames + t * frame_step + d, lanes);
      if (kQ > 1) __builtin_prefetch(frames + t * frame_step + d + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) {
      Vector probe = load(probes + q * probe_step + d, lanes);
      MER_JAX_KEEP(probe);
#pragma GCC unroll 8
      for (int t = 0; t < kT; ++t) tile[t][q] += frame[t] * probe;
    }
  };
  int d = 0;
  for (; d + kLanes <= width; d += kLanes) step(d, kLanes);
  if (d < width) step(d, width - d);
#pragma GCC unroll 8
  for (int t = 0; t < kT; ++t)
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[t * sum_step + q] = tile[t][q];
}

// The same for any number of frames and probes, a tile at a time.
template <int kQ>
void add_tiles(const float* frames, std::size_t frame_step, std::ptrdiff_t ahead, const float* probes,
               std::size_t probe_step, int count, int width, Vector* sums, std::size_t queries) {
  int t = 0;
  for (; t + kFrames <= count; t += kFrames)
    add_products<kFrames, kQ>(frames + t * frame_step, frame_step, ahead, probes, probe_step, width, sums + t * queries,
                              queries);
  for (; t < count; ++t)
    add_products<1, kQ>(frames + t * frame_step, frame_step, ahead, probes, probe_step, width, sums + t * queries,
                        queries);
}

void add_all_products(const float* frames, std::size_t frame_step, std::ptrdiff_t ahead, const float* probes,
                      std::size_t probe_step, int count, int queries, int width, Vector* sums) {
  int q = 0;
  for (; q + kQueries <= queries; q += kQueries)
    add_tiles<kQueries>(frames, frame_step, ahead, probes + q * probe_step, probe_step, count, width, sums + q,
                        queries);
  for (; q < queries; ++q)
    add_tiles<1>(frames, frame_step, ahead, probes + q * probe_step, probe_step, count, width, sums + q, queries);
}

// The frames of each sample of a batch.
class Frames {
 public:
  Frames(const ffi::Buffer<ffi::F32>& data, int fold, const std::int32_t* index)
      : data_(data.typed_data()), index_(index) {
    const auto sides = data.dimensions();  // (F or 1, N, T, D)
    count_ = sides[1];
    size_ = sides[2] * sides[3];
    fold_ = std::clamp<std::int64_t>(fold, 0, sides[0] - 1);
  }
  const float* of(int sample) const {
    const std::int64_t within = std::clamp<std::int64_t>(index_[sample], 0, count_ - 1);
    return data_ + (fold_ * count_ + within) * size_;
  }
  // How far from a sample's frames those of the next one lie.
  std::ptrdiff_t ahead(int sample, int samples) const { return of(std::min(sample + 1, samples - 1)) - of(sample); }

 private:
  const float* data_;
  const std::int32_t* index_;
  std::int64_t count_, size_, fold_;
};

// Sums (T, Q) of a clip's frames with probes, which are scaled a part at a time.
void add_scores(const Shape& shape, const float* frames, std::ptrdiff_t ahead, const float* scale, const float* probes,
                float* chunk, Vector* sums) {
  const auto [samples, count, width, queries] = shape;
  for (int start = 0; start < width; start += kChunk) {
    const int part = std::min(kChunk, width - start);
    const float* some = probes + start;
    std::size_t step = width;
    if (scale) {
      for (int q = 0; q < queries; ++q)
        for (int d = 0; d < part; ++d) chunk[q * kChunk + d] = some[q * step + d] * scale[start + d];
      some = chunk;
      step = kChunk;
    }
    add_all_products(frames + start, width, ahead, some, step, count, queries, part, sums);
  }
}

// Attention (Q, T) from sums (T, Q), and its mean over queries (T); `scores` is room for (T + 2, Q). Queries fill the
// lanes of vectors.
void soften(const Shape& shape, const Vector* sums, const bool* mask, float* scores, float* attention, float* mean) {
  const auto [samples, count, width, queries] = shape;
  float *const largest = scores + static_cast<std::size_t>(count) * queries, *const sum = largest + queries;
  std::fill_n(largest, queries, kMaskedScore);
  std::fill_n(sum, queries, 0.0f);
  float* row = scores;
  for (int t = 0; t < count; ++t, row += queries)
    for (int q = 0; q < queries; ++q) {
      row[q] = mask[t] ? total(*sums++) : (++sums, kMaskedScore);
      largest[q] = row[q] > largest[q] ? row[q] : largest[q];
    }
  row = scores;
  for (int t = 0; t < count; ++t, row += queries)
    for (int q = 0; q < queries; ++q) row[q] -= largest[q];
  for (float* each = scores; each < largest; ++each) *each = exponential(*each);
  row = scores;
  for (int t = 0; t < count; ++t, row += queries)
    for (int q = 0; q < queries; ++q) sum[q] += row[q];
  row = scores;
  for (int t = 0; t < count; ++t, row += queries) {
    float whole = 0.0f;
    for (int q = 0; q < queries; ++q) {
      const float weight = row[q] / sum[q];
      attention[static_cast<std::size_t>(q) * count + t] = weight;
      whole += weight;
    }
    mean[t] = whole / queries;
  }
}

// The weighted sum of frames, in some vectors of values.
template <int kVectors>
void pool(const Shape& shape, const float* frames, const float* weights, const float* scale, float* pooled, int d,
          int lanes) {
  Vector sum[kVectors] = {};
  for (int t = 0; t < shape.frames; ++t, frames += shape.width)
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) sum[n] += weights[t] * load(frames + d + n * kLanes, lanes);
#pragma GCC unroll 8
  for (int n = 0; n < kVectors; ++n)
    store(pooled + d + n * kLanes, scale ? sum[n] * load(scale + d + n * kLanes, lanes) : sum[n], lanes);
}

void pool_all(const Shape& shape, const float* frames, const float* weights, const float* scale, float* pooled) {
  int d = 0;
  for (; d + 4 * kLanes <= shape.width; d += 4 * kLanes) pool<4>(shape, frames, weights, scale, pooled, d, kLanes);
  for (; d < shape.width; d += kLanes)
    pool<1>(shape, frames, weights, scale, pooled, d, std::min(kLanes, shape.width - d));
}

// attention (B, Q, T) and pooled (B, D) of probes (Q, D), a mask of frames (B, T), and a scale (B, D) or none.
void forward(const Shape& shape, const Frames& frames, const bool* mask, const float* scale, const float* probes,
             float* pooled, float* attention) {
  const auto [samples, count, width, queries] = shape;
  std::vector<Vector> sums(static_cast<std::size_t>(count) * queries), chunk(queries * kChunk / kLanes);
  std::vector<float> scores(static_cast<std::size_t>(count + 2) * queries), weights(count);
  for (int b = 0; b < samples; ++b) {
    std::fill(sums.begin(), sums.end(), Vector{});
    add_scores(shape, frames.of(b), frames.ahead(b, samples), scale, probes, reinterpret_cast<float*>(chunk.data()),
               sums.data());
    soften(shape, sums.data(), mask, scores.data(), attention, weights.data());
    pool_all(shape, frames.of(b), weights.data(), scale, pooled);
    mask += count;
    scale = scale ? scale + width : nullptr;
    pooled += width;
    attention += static_cast<std::size_t>(queries) * count;
  }
}

// Adds what `queries` weights of each frame make of the frames, to the gradients of kQ probes.
template <int kQ, int kVectors>
void add_weighted(const float* frames, std::ptrdiff_t ahead, const float* weights, const float* factor,
                  float* of_probes, const Shape& shape, int d, int lanes) {
  const auto [samples, count, width, queries] = shape;
  Vector sum[kQ][kVectors] = {};
  for (int t = 0; t < count; ++t) {
    Vector frame[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const float* const from = frames + static_cast<std::size_t>(t) * width + d + n * kLanes;
      frame[n] = load(from, lanes);
      if (kQ > 1) __builtin_prefetch(from + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q)
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[q][n] += weights[t * static_cast<std::size_t>(queries) + q] * frame[n];
  }
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const Vector by = factor ? load(factor + d + n * kLanes, lanes) : Vector{} + 1.0f;
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) {
      float* const to = of_probes + static_cast<std::size_t>(q) * width + d + n * kLanes;
      store(to, load(to, lanes) + by * sum[q][n], lanes);
    }
  }
}

template <int kQ>
void add_all_weighted(const float* frames, std::ptrdiff_t ahead, const float* weights, const float* factor,
                      float* of_probes, const Shape& shape) {
  const int width = shape.width;
  int d = 0;
  for (; d + kAcross * kLanes <= width; d += kAcross * kLanes)
    add_weighted<kQ, kAcross>(frames, ahead, weights, factor, of_probes, shape, d, kLanes);
  for (; d < width; d += kLanes)
    add_weighted<kQ, 1>(frames, ahead, weights, factor, of_probes, shape, d, std::min(kLanes, width - d));
}

// The gradient of the probes (Q, D), from those of pooled frames (B, D) and attention (B, Q, T).
void backward(const Shape& shape, const Frames& frames, const float* scale, const float* attention,
              const float* of_pooled, const float* of_attention, float* of_probes) {
  const auto [samples, count, width, queries] = shape;
  std::vector<Vector> sums(count);
  std::vector<float> scaled(width), of_scores(static_cast<std::size_t>(count) * queries), of_weights(count);
  std::fill_n(of_probes, static_cast<std::size_t>(queries) * width, 0.0f);
  for (int b = 0; b < samples; ++b) {
    const float* const own = frames.of(b);
    const float* const factor = scale ? scale + static_cast<std::size_t>(b) * width : nullptr;
    const float* probe = of_pooled + static_cast<std::size_t>(b) * width;
    if (factor) {
      for (int d = 0; d < width; ++d) scaled[d] = probe[d] * factor[d];
      probe = scaled.data();
    }
    std::fill(sums.begin(), sums.end(), Vector{});
    add_all_products(own, width, 0, probe, width, count, 1, width, sums.data());
    for (int t = 0; t < count; ++t) of_weights[t] = total(sums[t]) / queries;
    for (int q = 0; q < queries; ++q) {
      const std::size_t row = (static_cast<std::size_t>(b) * queries + q) * count;
      float mean = 0.0f;
      for (int t = 0; t < count; ++t) mean += attention[row + t] * (of_weights[t] + of_attention[row + t]);
      for (int t = 0; t < count; ++t)
        of_scores[t * static_cast<std::size_t>(queries) + q] =
            attention[row + t] * (of_weights[t] + of_attention[row + t] - mean);
    }
    int q = 0;
    for (; q + kQueries <= queries; q += kQueries)
      add_all_weighted<kQueries>(own, frames.ahead(b, samples), of_scores.data() + q, factor,
                                 of_probes + static_cast<std::size_t>(q) * width, shape);
    for (; q < queries; ++q)
      add_all_weighted<1>(own, 0, of_scores.data() + q, factor, of_probes + static_cast<std::size_t>(q) * width, shape);
  }
}

using Floats = ffi::Buffer<ffi::F32>;

int side(const Floats& array, int axis) { return static_cast<int>(array.dimensions()[axis]); }

// No scale at all is an empty one.
const float* or_none(const Floats& array) { return array.element_count() ? array.typed_data() : nullptr; }

// data (F or 1, N, T, D), fold (), index (B), mask (B, T), scale (B, D) or (0, D) and probes (Q, D).
ffi::Error handle_forward(Floats data, ffi::BufferR0<ffi::S32> fold, ffi::BufferR1<ffi::S32> index,
                          ffi::Buffer<ffi::PRED> mask, Floats scale, Floats probes, ffi::Result<Floats> pooled,
                          ffi::Result<Floats> attention) {
  const Shape shape = {static_cast<int>(index.dimensions()[0]), side(data, 2), side(data, 3), side(probes, 0)};
  forward(shape, Frames(data, *fold.typed_data(), index.typed_data()), mask.typed_data(), or_none(scale),
          probes.typed_data(), pooled->typed_data(), attention->typed_data());
  return ffi::Error::Success();
}

// data, fold, index, scale, attention (B, Q, T), and the gradients of pooled frames and attention.
ffi::Error handle_backward(Floats data, ffi::BufferR0<ffi::S32> fold, ffi::BufferR1<ffi::S32> index, Floats scale,
                           Floats attention, Floats of_pooled, Floats of_attention, ffi::Result<Floats> of_probes) {
  const Shape shape = {static_cast<int>(index.dimensions()[0]), side(data, 2), side(data, 3), side(attention, 1)};
  backward(shape, Frames(data, *fold.typed_data(), index.typed_data()), or_none(scale), attention.typed_data(),
           of_pooled.typed_data(), of_attention.typed_data(), of_probes->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mer_jax_pool, handle_forward,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mer_jax_pool_gradient, handle_backward,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
