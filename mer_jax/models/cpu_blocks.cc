// Convolution, batch statistics and max pooling of small maps on a CPU; called from cpu_blocks.py through XLA's FFI.
//
// The samples of a batch fill the lanes of a vector. As many samples as there are lanes are worked on at a time, so
// that what they need stays in the cache of a core, and row by row: a row of a map is convolved, summed up and pooled
// before the next one begins. Maps are not stored, and are computed again for the gradient. Pixels are convolved in
// pairs, which spares a third of the products, in tiles that fill the registers. One thread works on a call; a study
// has a member for every core.
//
// Arrays are as in convolution.py: x (C, H, W, B) or (B, H, W, C), kernel (k, k, C, F), pooled maps (F, H', W', B).

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define MER_JAX_INLINED __attribute__((always_inline))
#if defined(__AVX__)
#define MER_JAX_KEEP(vector) asm("" : "+v"(vector))  // in a register
#else
#define MER_JAX_KEEP(vector)
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kFeatures = 8;  // in a tile: 8 x 3 sums, of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kFeatures = 4;  // 4 x 3 sums, of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kFeatures = 4;
#endif
constexpr int kHalf = kFeatures / 2;  // of which pairs of pixels take as many registers
constexpr int kAcross = 3;            // pairs of pixels, or threes of a kernel's taps, in a tile
constexpr int kPairsAtOnce = 16;      // whose gradients are at hand when the kernel's is summed up
constexpr int kPageBytes = 4096;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

using Place = std::uint16_t;  // the number of a pixel in its pooling window

template <typename T>
struct Vectors {
  typedef T Own __attribute__((vector_size(kVectorBytes)));
  typedef std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t> Order
      __attribute__((vector_size(kVectorBytes)));
  typedef double Wide __attribute__((vector_size(kLanes<T> * sizeof(double))));
  typedef std::int32_t Whole __attribute__((vector_size(kLanes<T> * sizeof(std::int32_t))));
  typedef Place Places __attribute__((vector_size(kLanes<T> * sizeof(Place))));
};
template <typename T>
using Vector = typename Vectors<T>::Own;
template <typename T>
using Wide = typename Vectors<T>::Wide;
template <typename T>
using Places = typename Vectors<T>::Places;

// By way of wider integers, which compilers convert in vectors.
template <typename T>
inline Places<T> to_places(Vector<T> numbers) {
  return __builtin_convertvector(__builtin_convertvector(numbers, typename Vectors<T>::Whole), Places<T>);
}
template <typename T>
inline Vector<T> to_numbers(Places<T> places) {
  return __builtin_convertvector(__builtin_convertvector(places, typename Vectors<T>::Whole), Vector<T>);
}

// The `lanes` samples that lie at `from`, and zeros.
template <typename V, typename T>
inline V load_as(const T* from, int lanes) {
  V vector = {};
  if (lanes * sizeof(T) == sizeof(V))
    std::memcpy(&vector, from, sizeof(V));
  else
    std::memcpy(&vector, from, lanes * sizeof(T));
  return vector;
}
template <typename T>
inline Vector<T> load(const T* from, int lanes) {
  return load_as<Vector<T>>(from, lanes);
}

template <typename T, typename V>
inline void store(T* to, V vector, int lanes) {
  if (lanes * sizeof(T) == sizeof(V))
    std::memcpy(to, &vector, sizeof(V));
  else
    std::memcpy(to, &vector, lanes * sizeof(T));
}

// Every other value of the first or second halves of two vectors: a0 b0 a1 b1 ...
template <typename T, std::size_t kFrom, std::size_t... kPlaces>
inline Vector<T> interleaved(Vector<T> a, Vector<T> b, std::index_sequence<kPlaces...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kPlaces % 2 * kLanes<T> + kFrom + kPlaces / 2)...);
#else
  return __builtin_shuffle(a, b, typename Vectors<T>::Order{(kPlaces % 2 * kLanes<T> + kFrom + kPlaces / 2)...});
#endif
}

// Turns the first so many values at the places of as many pointers as there are lanes into vectors. No pointer, zeros.
template <typename T>
void transpose(const T* const* from, std::size_t offset, int count, Vector<T>* to) {
  using Places = std::make_index_sequence<kLanes<T>>;
  Vector<T> rows[kLanes<T>], next[kLanes<T>];
#pragma GCC unroll 16
  for (int n = 0; n < kLanes<T>; ++n) rows[n] = from[n] ? load(from[n] + offset, count) : Vector<T>{};
#pragma GCC unroll 4
  for (int step = 1; step < kLanes<T>; step *= 2) {
#pragma GCC unroll 16
    for (int n = 0; n < kLanes<T> / 2; ++n) {
      next[2 * n] = interleaved<T, 0>(rows[n], rows[n + kLanes<T> / 2], Places());
      next[2 * n + 1] = interleaved<T, kLanes<T> / 2>(rows[n], rows[n + kLanes<T> / 2], Places());
    }
#pragma GCC unroll 16
    for (int n = 0; n < kLanes<T>; ++n) rows[n] = next[n];
  }
#pragma GCC unroll 16
  for (int n = 0; n < kLanes<T>; ++n) to[n] = rows[n];
}

// Memory for vectors, which a thread keeps for its next call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Makes room for so many vectors of each array.
  template <typename T>
  void take(std::initializer_list<std::pair<Vector<T>**, std::size_t>> arrays) {
    std::size_t total = 0;
    for (const auto& array : arrays) total += array.second * kVectorBytes;
    if (total > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(kVectorBytes, total);
      size_ = memory_ ? total : 0;
      if (!memory_) throw std::bad_alloc();
    }
    char* next = static_cast<char*>(memory_);
    for (const auto& array : arrays) {
      *array.first = reinterpret_cast<Vector<T>*>(next);
      next += array.second * kVectorBytes;
    }
  }

 private:
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};
thread_local Scratch scratch;

template <typename T>
void clear(Vector<T>* vectors, std::size_t count) {
  std::memset(static_cast<void*>(vectors), 0, count * kVectorBytes);
}

constexpr int tiles(int features) { return (features + kFeatures - 1) / kFeatures; }

struct Shape {
  int channels, height, width, batch;  // of the input
  int size, features;                  // of the kernel
  int padding, window, pool_padding;
  bool rectify;
  bool batch_first;  // x is (B, H, W, C)

  int padded_height() const { return height + 2 * padding; }
  int padded_width() const { return width + 2 * padding; }
  int rows() const { return padded_height() - size + 1; }
  int columns() const { return padded_width() - size + 1; }
  int pairs() const { return (columns() + 1) / 2; }
  int pooled_rows() const { return (rows() + 2 * pool_padding - window) / window + 1; }
  int pooled_columns() const { return (columns() + 2 * pool_padding - window) / window + 1; }
  // Where places of samples `start` and following lie, (B / samples in a vector, H', F, W', samples in a vector):
  // unlike the maps one after the other.
  template <typename T>
  std::size_t place_at(int start, int row, int feature, int column) const {
    const std::size_t maps = static_cast<std::size_t>(features) * pooled_columns() * pooled_rows();
    const std::size_t rest = (static_cast<std::size_t>(row) * features + feature) * pooled_columns() + column;
    return start * maps + rest * kLanes<T>;
  }
  // The window that holds a row of the map, and the number of the row's first pixel within it.
  int window_of(int row) const { return (row + pool_padding) / window; }
  int place_of(int row) const { return (row + pool_padding) % window * window; }
};

// A convolution of a row with three taps: two neighbouring results from four products (Winograd 1980),
//
//   z0 = p0 + p1 + p2    p0 = (x0 - x2) w0    p1 = (x1 + x2) (w0 + w1 + w2) / 2
//   z1 = p1 - p2 - p3    p3 = (x1 - x3) w2    p2 = (x2 - x1) (w0 - w1 + w2) / 2
//
// Products of a kind are added up over channels, rows and, three by three, the taps of larger kernels.
constexpr int kKinds = 4;

// Rows of padded maps as such products take them, (kinds, channels, rows, columns to begin with, pairs): pairs of
// results begin at even columns, and at odd ones for the second three taps of a kernel. A ring: row r lies at place
// r % rows. It holds what `results` neighbouring rows of results are made from, and a new row takes the place of one
// that is done with, so that what is at work stays in the first cache if it fits.
template <typename T>
struct Band {
  Vector<T>* at;
  int channels, starts, pairs, rows;

  Band(int channels, int results, int size, int pixels)
      : at(nullptr), channels(channels), starts(size > 3 ? 2 : 1), pairs((pixels + 1) / 2), rows(results + size - 1) {}

  std::size_t width() const { return static_cast<std::size_t>(starts) * pairs; }
  std::size_t plane() const {
    // A quarter of a page apart, so that none displaces the others from the first cache.
    constexpr std::size_t page = kPageBytes / kVectorBytes;
    return (channels * rows * width() + page - 1) / page * page + page / 4;
  }
  std::size_t count() const { return kKinds * plane(); }
  std::ptrdiff_t offset(int channel, int row, int column) const {
    return (static_cast<std::ptrdiff_t>(channel) * rows + row % rows) * width() +
           static_cast<std::ptrdiff_t>(column % 2) * pairs + column / 2;
  }

  // Takes a row of pixels `stride` vectors apart, of which there are `beyond` more than padded maps have, all zero.
  static constexpr int beyond = 4;
  void take(const Vector<T>* pixels, int stride, int channel, int row) const {
    Vector<T>* to = at + offset(channel, row, 0);
    for (int start = 0; start < starts; ++start)
      for (int pair = 0; pair < pairs; ++pair, ++to) {
        const Vector<T>* from = pixels + (start + 2 * pair) * stride;
        const Vector<T> x[] = {from[0], from[stride], from[2 * stride], from[3 * stride]};
        to[0] = x[0] - x[2];
        to[plane()] = x[1] + x[2];
        to[2 * plane()] = x[2] - x[1];
        to[3 * plane()] = x[1] - x[3];
      }
  }
  void take_zeros(int row) const {
    for (int kind = 0; kind < kKinds; ++kind)
      for (int c = 0; c < channels; ++c) clear<T>(at + kind * plane() + offset(c, row, 0), width());
  }
};

// The rows of some samples of x, padded by zeros, each once and in their order; of samples that do not count, by a mask
// or because they are none, zeros as well, whatever they hold.
template <typename T>
class Source {
 public:
  // `line` is for the pixels of a row, of all channels where they lie together and else of one. It is zero, and stays
  // so where there are no pixels.
  Source(const T* x, const Shape& shape, Vector<T>* line) : x_(x), shape_(shape), line_(line) {}
  static std::size_t line_count(const Shape& shape) {
    const std::size_t pixels = shape.padded_width() + Band<T>::beyond;
    return shape.batch_first ? pixels * shape.channels + kLanes<T> : pixels;
  }

  // Begins with samples `start` and following.
  void begin(int start, int lanes, Vector<T> mask) {
    start_ = start, lanes_ = lanes, next_ = 0, counts_ = mask != 0;
    for (int n = 0; shape_.batch_first && n < kLanes<T>; ++n)
      samples_[n] = counts_[n] && n < lanes
                        ? x_ + static_cast<std::size_t>(start + n) * shape_.height * shape_.width * shape_.channels
                        : nullptr;
  }
  // Takes the rows before `end` that are yet to be taken.
  void take(int end, const Band<T>& to) {
    for (; next_ < end; ++next_) {
      const int h = next_ - shape_.padding;
      if (h < 0 || h >= shape_.height)
        to.take_zeros(next_);
      else if (shape_.batch_first)
        take_turned(h, to);
      else
        take_row(h, to);
    }
  }

 private:
  void take_turned(int h, const Band<T>& to) {
    const int values = shape_.width * shape_.channels;
    for (int from = 0; from < values; from += kLanes<T>) {
      const int begin = std::max(0, std::min(from, values - kLanes<T>));
      transpose(samples_, static_cast<std::size_t>(h) * values + begin, std::min(values, kLanes<T>),
                line_ + shape_.padding * shape_.channels + begin);
    }
    for (int c = 0; c < shape_.channels; ++c) to.take(line_ + c, shape_.channels, c, next_);
  }
  void take_row(int h, const Band<T>& to) {
    for (int c = 0; c < shape_.channels; ++c) {
      const T* from = x_ + (static_cast<std::size_t>(c) * shape_.height + h) * shape_.width * shape_.batch + start_;
      for (int w = 0; w < shape_.width; ++w, from += shape_.batch)
        line_[shape_.padding + w] = counts_ ? load(from, lanes_) : Vector<T>{};
      to.take(line_, 1, c, next_);
    }
  }

  const T* x_;
  const Shape& shape_;
  Vector<T>* line_;
  int start_ = 0, lanes_ = 0, next_ = 0;
  typename Vectors<T>::Order counts_ = {};
  const T* samples_[kLanes<T>] = {};
};

// A kernel as its products take it: three taps of a row at a time, those first that have a third.
struct Triples {
  struct Triple {
    int channel, row, column;
  };
  std::vector<Triple> of;
  std::size_t whole = 0;  // those with a third tap
  int channels, size, features;

  Triples(int channels, int size, int features) : channels(channels), size(size), features(features) {
    for (const bool third : {true, false}) {
      for (int c = 0; c < channels; ++c)
        for (int i = 0; i < size; ++i)
          for (int j = 0; j < size; j += 3)
            if ((j + 2 < size) == third) of.push_back({c, i, j});
      if (third) whole = of.size();
    }
  }

  std::size_t count() const { return of.size(); }

  // Where they begin in a band, (row of results modulo the band's rows, triple).
  template <typename T>
  std::vector<std::ptrdiff_t> offsets(const Band<T>& band) const {
    std::vector<std::ptrdiff_t> result;
    for (int row = 0; row < band.rows; ++row)
      for (const Triple& triple : of) result.push_back(band.offset(triple.channel, row + triple.row, triple.column));
    return result;
  }

  // How many weights there are of half a tile.
  std::size_t weights() const { return (3 * count() + whole) * kHalf; }

  // A kernel (k, k, C, F) as (half a tile; second and third products of all triples, first and last of whole ones,
  // first of the others; features), filled up with zeros.
  template <typename T>
  std::vector<T> packed(const T* kernel) const {
    std::vector<T> result(2 * tiles(features) * weights(), T(0));
    for (int f = 0; f < features; ++f) {
      T* to = result.data() + f / kHalf * weights() + f % kHalf;
      const auto tap = [&](const Triple& of, int beyond) {
        const std::size_t at = static_cast<std::size_t>(of.row) * size + of.column + beyond;
        return of.column + beyond < size ? kernel[(at * channels + of.channel) * features + f] : T(0);
      };
      for (const Triple& triple : of) {
        const T outer = tap(triple, 0) + tap(triple, 2);
        to[0] = (outer + tap(triple, 1)) / 2;
        to[kHalf] = (outer - tap(triple, 1)) / 2;
        to += 2 * kHalf;
      }
      for (std::size_t n = 0; n < count(); ++n) {
        to[0] = tap(of[n], 0);
        if (n < whole) to[kHalf] = -tap(of[n], 2);
        to += n < whole ? 2 * kHalf : kHalf;
      }
    }
    return result;
  }
};

// The kernel (k, k, F, C) that takes gradients of the maps to those of the input.
template <typename T>
std::vector<T> turned(const T* kernel, int size, int channels, int features) {
  std::vector<T> result(static_cast<std::size_t>(size) * size * channels * features);
  for (int i = 0; i < size; ++i)
    for (int j = 0; j < size; ++j)
      for (int c = 0; c < channels; ++c)
        for (int f = 0; f < features; ++f)
          result[(((size - 1 - i) * static_cast<std::size_t>(size) + size - 1 - j) * features + f) * channels + c] =
              kernel[((static_cast<std::size_t>(i) * size + j) * channels + c) * features + f];
  return result;
}

// `kPairs` pairs of pixels of a row, for half the features of a tile with `stride` between them.
template <typename T, int kPairs>
inline void convolve_tile(const Vector<T>* x, std::size_t plane, const std::ptrdiff_t* offsets, std::size_t count,
                          std::size_t whole, const T* weights, Vector<T>* z, std::size_t stride) {
  Vector<T> even[kHalf][kPairs] = {}, odd[kHalf][kPairs] = {};
  const auto add = [&](Vector<T>(&sums)[kHalf][kPairs], const Vector<T>* at) MER_JAX_INLINED {
    Vector<T> pixels[kPairs];
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      pixels[p] = at[p];
      MER_JAX_KEEP(pixels[p]);
    }
#pragma GCC unroll 16
    for (int f = 0; f < kHalf; ++f) {
      const T weight = weights[f];
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) sums[f][p] += weight * pixels[p];
    }
    weights += kHalf;
  };
  for (std::size_t n = 0; n < count; ++n) {
    add(even, x + plane + offsets[n]);
    add(odd, x + 2 * plane + offsets[n]);
  }
#pragma GCC unroll 16
  for (int f = 0; f < kHalf; ++f)
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      const Vector<T> second = even[f][p], third = odd[f][p];
      even[f][p] = second + third;
      odd[f][p] = second - third;
    }
  for (std::size_t n = 0; n < whole; ++n) {
    add(even, x + offsets[n]);
    add(odd, x + 3 * plane + offsets[n]);
  }
  for (std::size_t n = whole; n < count; ++n) add(even, x + offsets[n]);
#pragma GCC unroll 16
  for (int f = 0; f < kHalf; ++f)
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) z[f * stride + 2 * p] = even[f][p], z[f * stride + 2 * p + 1] = odd[f][p];
}

// A row of a tile's features.
template <typename T>
void convolve_row(const Band<T>& x, int row, const Triples& triples, const std::vector<std::ptrdiff_t>& offsets,
                  const T* weights, int pairs, Vector<T>* z, std::size_t stride) {
  const std::ptrdiff_t* of_row = offsets.data() + row % x.rows * triples.count();
  const auto each = [&](auto tile, int pair) {
    for (int half = 0; half < 2; ++half)
      tile(x.at + pair, x.plane(), of_row, triples.count(), triples.whole, weights + half * triples.weights(),
           z + half * kHalf * stride + 2 * pair, stride);
  };
  int pair = 0;
  for (; pair + kAcross <= pairs; pair += kAcross) each(convolve_tile<T, kAcross>, pair);
  for (; pair < pairs; ++pair) each(convolve_tile<T, 1>, pair);
}

// Gradients of the maps of a tile of features, some rows of pairs of pixels.
template <typename T>
struct Tile {
  const Vector<T>* at;
  std::size_t stride, width;  // between features and rows
  int first, last;            // rows of the map from `first`, which lies at `at`, to before `last`
  int pairs;
};

// Adds gradients of `kTriples` weights of a kind: products of what the weights were multiplied with and gradients of
// the products.
template <typename T, int kKind, int kTriples>
inline void correlate_tile(const Band<T>& x, const Triples& triples, const std::vector<std::ptrdiff_t>& offsets,
                           std::size_t from, const Tile<T>& of, Vector<T>* sums) {
  Vector<T> held[kTriples][kFeatures];
#pragma GCC unroll 16
  for (int t = 0; t < kTriples; ++t)
#pragma GCC unroll 16
    for (int f = 0; f < kFeatures; ++f) held[t][f] = sums[t * kFeatures + f];
  for (int row = of.first; row < of.last; ++row) {
    const Vector<T>* at = of.at + (row - of.first) * of.width;
    const Vector<T>* of_triples[kTriples];
    for (int t = 0; t < kTriples; ++t)
      of_triples[t] = x.at + kKind * x.plane() + offsets[row % x.rows * triples.count() + from + t];
    for (int pair = 0; pair < of.pairs; ++pair, at += 2) {
      Vector<T> pixels[kTriples];
#pragma GCC unroll 16
      for (int t = 0; t < kTriples; ++t) pixels[t] = of_triples[t][pair];
#pragma GCC unroll 16
      for (int f = 0; f < kFeatures; ++f) {
        const Vector<T>* of_pair = at + f * of.stride;
        Vector<T> gradient = kKind == 0   ? of_pair[0]
                             : kKind == 1 ? of_pair[0] + of_pair[1]
                             : kKind == 2 ? of_pair[0] - of_pair[1]
                                          : of_pair[1];
        MER_JAX_KEEP(gradient);  // a load within each product would take longer than the products
#pragma GCC unroll 16
        for (int t = 0; t < kTriples; ++t) held[t][f] += pixels[t] * gradient;
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTriples; ++t)
#pragma GCC unroll 16
    for (int f = 0; f < kFeatures; ++f) sums[t * kFeatures + f] = held[t][f];
}

// Adds those of all weights, (kind, triple, feature).
template <typename T, int kKind = 0>
void correlate(const Band<T>& x, const Triples& triples, const std::vector<std::ptrdiff_t>& offsets, const Tile<T>& of,
               Vector<T>* sums) {
  const std::size_t count = kKind + 1 == kKinds ? triples.whole : triples.count();
  std::size_t n = 0;
  for (; n + kAcross <= count; n += kAcross)
    correlate_tile<T, kKind, kAcross>(x, triples, offsets, n, of, sums + n * kFeatures);
  for (; n < count; ++n) correlate_tile<T, kKind, 1>(x, triples, offsets, n, of, sums + n * kFeatures);
  if constexpr (kKind + 1 < kKinds)
    correlate<T, kKind + 1>(x, triples, offsets, of, sums + triples.count() * kFeatures);
}

// How the columns of a map fall into pooling windows. The windows from `begin` to `end` are whole.
struct Windows {
  int window, pool_padding, columns, count, begin, end;

  explicit Windows(const Shape& shape)
      : window(shape.window),
        pool_padding(shape.pool_padding),
        columns(shape.columns()),
        count(shape.pooled_columns()) {
    begin = std::min(count, pool_padding > 0 ? 1 : 0);
    end = std::max(begin, std::min(count, (columns + pool_padding) / window));
  }

  // The first column after all windows.
  int covered() const { return std::min(columns, count * window - pool_padding); }

  // Calls `visit(column, place in the window, number of a sum)` for all columns of windows, between `open(number)` and
  // `close(number)`. Whole windows are unrolled if kWindow is their side, not if it is 0.
  template <int kWindow, typename Open, typename Visit, typename Close>
  inline void each(Open open, Visit visit, Close close) const {
    const auto any = [&](int number) {
      const int first = number * window - pool_padding;
      open(number);
      for (int column = std::max(0, first); column < std::min(columns, first + window); ++column)
        visit(column, column - first, 0);
      close(number);
    };
    int number = 0;
    for (; number < (kWindow ? begin : count); ++number) any(number);
    if (kWindow)
      for (; number < end; ++number) {
        open(number);
#pragma GCC unroll 16
        for (int place = 0; place < kWindow; ++place) visit(number * kWindow - pool_padding + place, place, place);
        close(number);
      }
    for (; number < count; ++number) any(number);
  }
};

// A row of a map: whether a pooling window takes it, as its first or a later one, and the number of the row's first
// pixel.
struct Row {
  bool pooled, first;
  int place;

  Row(const Shape& shape, int row)
      : pooled(shape.window_of(row) < shape.pooled_rows()),
        first(row == 0 || shape.window_of(row) != shape.window_of(row - 1)),
        place(shape.place_of(row)) {}
};

// Sums of a feature's responses and of their squares, as deviations from a pilot: a response of the same sample, so
// that they are small where the variance is.
template <typename T>
struct Moments {
  Vector<T> pilot;
  Wide<T> sum, square;
};

// A feature as pooling sees it: the least response, and the windows of a row: their best values so far, and which
// pixels those are.
template <typename T>
struct Pooling {
  T least;
  Vector<T>*best, *place;
};

// Pools a row of a feature, by maxima or minima, and adds its responses to the moments. Where there are none, what is
// not a number wins; where there are, it spoils them, and with them everything.
template <typename T, int kWindow, bool kMinima, bool kRectify, bool kStatistics>
void pool_row(const Vector<T>* z, const Windows& windows, const Row& row, const Pooling<T>& pooling,
              Moments<T>* moments) {
  const Vector<T> pilot = kStatistics ? moments->pilot : Vector<T>{}, least = Vector<T>{} + pooling.least;
  constexpr int kSums = kWindow ? kWindow : 1;  // that do not wait for one another
  Vector<T> sum[kSums] = {}, square[kSums] = {};
  const auto add = [&](Vector<T> value, int number) MER_JAX_INLINED {
    if (!kStatistics) return;
    if (kRectify) value = value <= least ? least : value;  // not a number stays
    const Vector<T> deviation = value - pilot;
    sum[number] += deviation;
    square[number] += deviation * deviation;
  };
  int from = 0;
  if (row.pooled) {
    const Vector<T> none = Vector<T>{} + (kMinima ? 1 : -1) * std::numeric_limits<T>::infinity();
    Vector<T> most, where;
    windows.each<kWindow>(
        [&](int number) MER_JAX_INLINED {
          most = row.first ? none : pooling.best[number];
          where = row.first ? Vector<T>{} : pooling.place[number];
        },
        [&](int column, int place, int number) MER_JAX_INLINED {
          const Vector<T> value = z[column];
          const auto beats = kMinima ? value < most : value > most;
          const auto wins = kStatistics ? beats : beats | (value != value);
          most = wins ? value : most;
          where = wins ? Vector<T>{} + T(row.place + place) : where;
          add(value, number);
        },
        [&](int number) MER_JAX_INLINED { pooling.best[number] = most, pooling.place[number] = where; });
    from = windows.covered();
  }
  if (!kStatistics) return;
  for (int column = from; column < windows.columns; ++column) add(z[column], 0);
#pragma GCC unroll 16
  for (int number = 1; number < kSums; ++number) sum[0] += sum[number], square[0] += square[number];
  moments->sum += __builtin_convertvector(sum[0], Wide<T>);
  moments->square += __builtin_convertvector(square[0], Wide<T>);
}

template <typename T>
using PoolRow = void (*)(const Vector<T>*, const Windows&, const Row&, const Pooling<T>&, Moments<T>*);

template <typename T, int kWindow, bool kMinima>
PoolRow<T> pool_row_for(bool rectify, bool statistics) {
  if (!statistics) return pool_row<T, kWindow, kMinima, false, false>;
  return rectify ? pool_row<T, kWindow, kMinima, true, true> : pool_row<T, kWindow, kMinima, false, true>;
}
template <typename T, bool kMinima>
PoolRow<T> pool_row_for(const Shape& shape, bool statistics) {
  if (shape.window == 3) return pool_row_for<T, 3, kMinima>(shape.rectify, statistics);
  if (shape.window == 2) return pool_row_for<T, 2, kMinima>(shape.rectify, statistics);
  return pool_row_for<T, 0, kMinima>(shape.rectify, statistics);
}

// Gradients of a row of windows of a feature: of their winners, and which pixels those are.
template <typename T>
struct Winners {
  Vector<T>*gradient, *place;
};

// Takes `factor given` and places at some columns of maps (..., B).
template <typename T>
void take_winners(const T* given, const Place* place, T factor, int columns, int batch, int lanes,
                  const Winners<T>& to) {
  for (int column = 0; column < columns; ++column, given += batch, place += kLanes<T>) {
    to.gradient[column] = factor * load(given, lanes);
    to.place[column] = to_numbers<T>(load_as<Places<T>>(place, kLanes<T>));
  }
}

// The gradient of a feature's responses: `winners` less `constant + slope response` of all; none where a ReLU is
// closed, and none of samples beyond the mask.
template <typename T>
struct Gradient {
  T least, constant, slope;
  Vector<T> mask;
  Winners<T> winners;
};

// Turns a row of a feature into its gradient; returns the sum, where there is a ReLU.
template <typename T, int kWindow, bool kRectify>
Vector<T> gradient_row(Vector<T>* z, const Windows& windows, const Row& row, const Gradient<T>& of) {
  const auto counts = of.mask != 0;
  const Vector<T> none = {}, least = counts ? none + of.least : none + std::numeric_limits<T>::infinity();
  const Vector<T> constant = none + of.constant, slope = none + of.slope, first = none + T(row.place);
  constexpr int kSums = kWindow ? kWindow : 1;  // that do not wait for one another
  Vector<T> sum[kSums] = {};
  const auto turn = [&](int column, Vector<T> sparse, int number) MER_JAX_INLINED {
    const Vector<T> value = z[column];
    Vector<T> gradient = sparse - (constant + slope * value);
    if (kRectify) {
      gradient = value > least ? gradient : none;
      sum[number] += gradient;
    } else {
      gradient = counts ? gradient : none;
    }
    z[column] = gradient;
  };
  int from = 0;
  if (row.pooled) {
    Vector<T> winner, value;
    windows.each<kWindow>(
        [&](int number) MER_JAX_INLINED {
          winner = of.winners.place[number] - first;
          value = of.winners.gradient[number];
        },
        [&](int column, int place, int number)
            MER_JAX_INLINED { turn(column, winner == T(place) ? value : none, number); },
        [](int) {});
    from = windows.covered();
  }
  for (int column = from; column < windows.columns; ++column) turn(column, none, 0);
#pragma GCC unroll 16
  for (int number = 1; number < kSums; ++number) sum[0] += sum[number];
  return sum[0];
}

template <typename T>
using GradientRow = Vector<T> (*)(Vector<T>*, const Windows&, const Row&, const Gradient<T>&);

template <typename T, int kWindow>
GradientRow<T> gradient_row_for(bool rectify) {
  return rectify ? gradient_row<T, kWindow, true> : gradient_row<T, kWindow, false>;
}

// Asks for lines of memory that lie `apart` values from one another and are about to be written.
template <typename T>
void fetch(const T* to, int count, std::size_t apart) {
  for (int n = 0; n < count; ++n) __builtin_prefetch(to + n * apart, 1);
}

// Pools responses, less the bias; with `place` also says which pixel of its window won, and with `mean` what mean and
// variance the responses of the mask's samples have. A bias adds nothing to what is normalised but to where a ReLU
// begins: max(z + b, 0) - b = max(z, -b).
template <typename T>
void forward(const Shape& shape, const T* x, const T* kernel, const T* bias, const T* scale, const T* mask, T* extreme,
             Place* place, T* mean, T* variance) {
  const int rows = shape.rows(), columns = shape.columns();
  const int pooled_rows = shape.pooled_rows(), pooled_columns = shape.pooled_columns();
  const std::size_t pooled = static_cast<std::size_t>(shape.features) * pooled_columns;
  const std::size_t width = 2 * static_cast<std::size_t>(shape.pairs());
  Band<T> band(shape.channels, 1, shape.size, shape.padded_width());
  const std::size_t line_count = Source<T>::line_count(shape);
  Vector<T>*line, *z, *best, *where;
  scratch.take<T>(
      {{&band.at, band.count()}, {&line, line_count}, {&z, kFeatures * width}, {&best, pooled}, {&where, pooled}});
  clear<T>(line, line_count);
  Source<T> source(x, shape, line);
  const Triples triples(shape.channels, shape.size, shape.features);
  const auto offsets = triples.offsets(band);
  const auto weights = triples.packed(kernel);
  const Windows windows(shape);
  const PoolRow<T> maxima = pool_row_for<T, false>(shape, mean), minima = pool_row_for<T, true>(shape, mean);
  std::vector<Moments<T>> moments(shape.features);
  std::vector<double> means(shape.features, 0.0), deviations(shape.features, 0.0);
  const double pixels = static_cast<double>(rows) * columns;
  double count = 0.0;
  for (int start = 0; start < shape.batch; start += kLanes<T>) {
    const int lanes = std::min(kLanes<T>, shape.batch - start);
    const Vector<T> counts = mask ? load(mask + start, lanes) : Vector<T>{} + T(1);
    source.begin(start, lanes, counts);
    for (int row = 0; row < rows; ++row) {
      source.take(row + shape.size, band);
      const int window_row = shape.window_of(row);
      const Row of_row(shape, row);
      for (int f = 0; f < shape.features; ++f) {
        if (f % kFeatures == 0)
          convolve_row<T>(band, row, triples, offsets, weights.data() + f / kHalf * triples.weights(), shape.pairs(), z,
                          width);
        const Vector<T>* of_feature = z + f % kFeatures * width;
        if (row == 0) {
          const Vector<T> pilot = of_feature[columns / 2], least = Vector<T>{} - bias[f];
          moments[f] = {shape.rectify ? (pilot <= least ? least : pilot) : pilot, Wide<T>{}, Wide<T>{}};
        }
        const std::size_t at = static_cast<std::size_t>(f) * pooled_columns;
        if (of_row.pooled && of_row.first)
          fetch(extreme + (at * pooled_rows + window_row * pooled_columns) * shape.batch + start, pooled_columns,
                shape.batch);
        (scale[f] < 0 ? minima : maxima)(of_feature, windows, of_row, {-bias[f], best + at, where + at}, &moments[f]);
      }
      if (!of_row.pooled || (row < rows - 1 && !Row(shape, row + 1).first)) continue;
      for (int f = 0; f < shape.features; ++f) {
        // Without a ReLU nothing is too little.
        const Vector<T> least = Vector<T>{} - (shape.rectify ? bias[f] : std::numeric_limits<T>::infinity());
        const std::size_t at = static_cast<std::size_t>(f) * pooled_columns;
        T* to = extreme + (at * pooled_rows + window_row * pooled_columns) * shape.batch + start;
        for (int column = 0; column < pooled_columns; ++column, to += shape.batch) {
          const Vector<T> value = best[at + column];
          store(to, value <= least ? least : value, lanes);
        }
        if (!place) continue;
        Place* to_place = place + shape.template place_at<T>(start, window_row, f, 0);
        for (int column = 0; column < pooled_columns; ++column, to_place += kLanes<T>)
          store(to_place, to_places<T>(where[at + column]), kLanes<T>);
      }
    }
    // Chan, Golub and LeVeque 1979: deviations of the parts, here samples, and of their means.
    for (int lane = 0; mean && lane < lanes; ++lane) {
      if (mask[start + lane] == 0) continue;
      const double before = count;
      count += pixels;
      const double share = pixels / count;
      for (int f = 0; f < shape.features; ++f) {
        const double sum = moments[f].sum[lane], beyond = sum / pixels;
        const double delta = moments[f].pilot[lane] + beyond - means[f];
        means[f] += delta * share;
        deviations[f] += moments[f].square[lane] - sum * beyond + delta * delta * before * share;
      }
    }
  }
  for (int f = 0; mean && f < shape.features; ++f) {
    mean[f] = static_cast<T>(means[f]);
    variance[f] = static_cast<T>(deviations[f] < 0 ? 0 : deviations[f] / std::max(count, 1.0));
  }
}

// Gradients of kernel and bias, and of x unless `x_gradient` is null, for gradients `factor given` of the pooled
// extremes, `constant + slope response` of all pixels taken off.
template <typename T>
void backward(const Shape& shape, const T* x, const T* kernel, const T* bias, const T* mask, const T* given,
              const Place* place, const T* factor, const T* constant, const T* slope, T* x_gradient, T* kernel_gradient,
              T* bias_gradient) {
  const int rows = shape.rows(), columns = shape.columns(), pairs = shape.pairs();
  const int pooled_rows = shape.pooled_rows(), pooled_columns = shape.pooled_columns();
  const int features = tiles(shape.features) * kFeatures;
  const std::size_t width = 2 * static_cast<std::size_t>(pairs);
  const Triples triples(shape.channels, shape.size, shape.features);
  const std::size_t of_tile_count = kKinds * triples.count() * kFeatures,
                    sums_count = of_tile_count * tiles(shape.features);
  const int at_once = std::min(rows, std::max(1, kPairsAtOnce / pairs));
  Band<T> band(shape.channels, at_once, shape.size, shape.padded_width());
  // All gradients of the maps are kept, between zeros, for that of x; else those of some rows of a tile.
  const int around = x_gradient ? shape.size - 1 - shape.padding : 0;
  const int z_rows = x_gradient ? rows + 2 * around : at_once;
  const int z_pixels = static_cast<int>(width) + 2 * around, z_width = z_pixels + Band<T>::beyond;
  const std::size_t z_plane = static_cast<std::size_t>(z_rows) * z_width;
  const std::size_t z_count = (x_gradient ? features : kFeatures) * z_plane;
  const int back_pairs = (shape.width + 1) / 2;
  Band<T> back_band(shape.features, 1, shape.size, z_pixels);
  const std::size_t line_count = Source<T>::line_count(shape);
  Vector<T>*line, *z, *sums, *bias_sums, *best, *where, *back;
  scratch.take<T>({{&band.at, band.count()},
                   {&line, line_count},
                   {&z, z_count},
                   {&sums, sums_count},
                   {&bias_sums, static_cast<std::size_t>(features)},
                   {&best, static_cast<std::size_t>(features) * pooled_columns},
                   {&where, static_cast<std::size_t>(features) * pooled_columns},
                   {&back_band.at, x_gradient ? back_band.count() : 0},
                   {&back, 2 * static_cast<std::size_t>(kFeatures) * back_pairs}});
  clear<T>(line, line_count);
  clear<T>(z, z_count);
  Source<T> source(x, shape, line);
  const auto offsets = triples.offsets(band);
  const auto weights = triples.packed(kernel);
  const Triples back_triples(shape.features, shape.size, shape.channels);
  std::vector<std::ptrdiff_t> back_offsets;
  std::vector<T> back_weights;
  if (x_gradient) {
    back_offsets = back_triples.offsets(back_band);
    back_weights = back_triples.packed(turned(kernel, shape.size, shape.channels, shape.features).data());
  }
  const Windows windows(shape);
  const GradientRow<T> to_gradient = shape.window == 3   ? gradient_row_for<T, 3>(shape.rectify)
                                     : shape.window == 2 ? gradient_row_for<T, 2>(shape.rectify)
                                                         : gradient_row_for<T, 0>(shape.rectify);
  std::vector<double> totals(sums_count, 0.0), bias_totals(shape.features, 0.0);
  for (int start = 0; start < shape.batch; start += kLanes<T>) {
    const int lanes = std::min(kLanes<T>, shape.batch - start);
    const Vector<T> valid = load(mask + start, lanes);
    clear<T>(sums, sums_count);
    clear<T>(bias_sums, features);
    source.begin(start, lanes, valid);
    for (int first = 0, last; first < rows; first = last) {
      last = std::min(rows, first + at_once);
      source.take(last + shape.size - 1, band);
      for (int begin = 0; begin < shape.features; begin += kFeatures) {
        Vector<T>* of_tile = z;
        if (x_gradient) of_tile += begin * z_plane + static_cast<std::size_t>(first + around) * z_width + around;
        for (int row = first; row < last; ++row) {
          Vector<T>* of_rows = of_tile + static_cast<std::size_t>(row - first) * z_width;
          convolve_row<T>(band, row, triples, offsets, weights.data() + begin / kHalf * triples.weights(), pairs,
                          of_rows, z_plane);
          for (int f = 0; f < std::min(shape.features - begin, kFeatures); ++f) {
            const Row of_map(shape, row);
            const std::size_t window = static_cast<std::size_t>(begin + f) * pooled_columns;
            const Winners<T> winners = {best + window, where + window};
            if (of_map.pooled && of_map.first) {
              const int window_row = shape.window_of(row);
              const T* from = given + (window * pooled_rows + window_row * pooled_columns) * shape.batch + start;
              take_winners(from, place + shape.template place_at<T>(start, window_row, begin + f, 0), factor[begin + f],
                           pooled_columns, shape.batch, lanes, winners);
            }
            Vector<T>* of_row = of_rows + f * z_plane;
            bias_sums[begin + f] += to_gradient(
                of_row, windows, of_map, {-bias[begin + f], constant[begin + f], slope[begin + f], valid, winners});
            if (columns % 2) of_row[columns] = Vector<T>{};
          }
        }
        correlate<T>(band, triples, offsets, {of_tile, z_plane, static_cast<std::size_t>(z_width), first, last, pairs},
                     sums + begin / kFeatures * of_tile_count);
      }
    }
    for (std::size_t at = 0; at < totals.size(); ++at)
      for (int lane = 0; lane < kLanes<T>; ++lane) totals[at] += sums[at][lane];
    for (int f = 0; f < shape.features; ++f)
      for (int lane = 0; lane < kLanes<T>; ++lane) bias_totals[f] += bias_sums[f][lane];
    for (int row = 0, taken = 0; x_gradient && row < shape.height; ++row) {
      for (; taken < row + shape.size; ++taken)
        for (int f = 0; f < shape.features; ++f)
          back_band.take(z + f * z_plane + static_cast<std::size_t>(taken) * z_width, 1, f, taken);
      for (int c = 0; c < shape.channels; ++c) {
        if (c % kFeatures == 0)
          convolve_row<T>(back_band, row, back_triples, back_offsets,
                          back_weights.data() + c / kHalf * back_triples.weights(), back_pairs, back, 2 * back_pairs);
        T* to = x_gradient + (static_cast<std::size_t>(c) * shape.height + row) * shape.width * shape.batch + start;
        for (int column = 0; column < shape.width; ++column)
          store(to + static_cast<std::size_t>(column) * shape.batch, back[c % kFeatures * 2 * back_pairs + column],
                lanes);
      }
    }
  }
  for (int f = 0; f < shape.features; ++f) {
    bias_gradient[f] = shape.rectify ? static_cast<T>(bias_totals[f]) : T(0);
    for (std::size_t n = 0; n < triples.count(); ++n) {
      const auto total = [&](int kind) {
        return totals[f / kFeatures * of_tile_count + (kind * triples.count() + n) * kFeatures + f % kFeatures];
      };
      const double half = (total(1) + total(2)) / 2;
      const double taps[] = {total(0) + half, (total(1) - total(2)) / 2, half - total(3)};
      const auto [c, i, j] = triples.of[n];
      for (int tap = 0; tap < std::min(3, shape.size - j); ++tap)
        kernel_gradient[((static_cast<std::size_t>(i) * shape.size + j + tap) * shape.channels + c) * shape.features +
                        f] = static_cast<T>(taps[tap]);
    }
  }
}

// Sums of `gradient (extreme - mean)` and of `gradient`, both (F, pixels, B), over pixels and the samples of the mask.
template <typename T>
void sums(int features, int pixels, int batch, const T* gradient, const T* extreme, const T* mean, const T* mask,
          T* products, T* totals) {
  for (int f = 0; f < features; ++f) {
    Wide<T> product = {}, total = {};
    for (int pixel = 0; pixel < pixels; ++pixel) {
      Vector<T> of_product = {}, of_total = {};
      for (int start = 0; start < batch; start += kLanes<T>) {
        const int lanes = std::min(kLanes<T>, batch - start);
        const Vector<T> counted = load(mask + start, lanes) * load(gradient + start, lanes);
        of_product += counted * (load(extreme + start, lanes) - mean[f]);
        of_total += counted;
      }
      gradient += batch;
      extreme += batch;
      product += __builtin_convertvector(of_product, Wide<T>);
      total += __builtin_convertvector(of_total, Wide<T>);
    }
    double both[2] = {};
    for (int lane = 0; lane < kLanes<T>; ++lane) both[0] += product[lane], both[1] += total[lane];
    products[f] = static_cast<T>(both[0]);
    totals[f] = static_cast<T>(both[1]);
  }
}

// The arrays of a call, by their numbers.
template <typename T>
struct Arrays {
  const ffi::RemainingArgs& given;
  const ffi::RemainingRets& results;

  template <typename U = T>
  const U* in(std::size_t number) const {
    return given.get<ffi::AnyBuffer>(number)->template reinterpret_data<U>();
  }
  template <typename U = T>
  U* out(std::size_t number) const {
    return (*results.get<ffi::AnyBuffer>(number))->template reinterpret_data<U>();
  }
};

// x, kernel, bias and scale to the pooled extremes.
struct Extremes {
  template <typename T>
  static void run(const Shape& shape, const Arrays<T>& of) {
    forward<T>(shape, of.in(0), of.in(1), of.in(2), of.in(3), nullptr, of.out(0), nullptr, nullptr, nullptr);
  }
};

// x, kernel, bias, scale and mask to the pooled extremes, their places, mean and variance.
struct Forward {
  template <typename T>
  static void run(const Shape& shape, const Arrays<T>& of) {
    forward<T>(shape, of.in(0), of.in(1), of.in(2), of.in(3), of.in(4), of.out(0), of.template out<Place>(1), of.out(2),
               of.out(3));
  }
};

// x, kernel, bias, mask, gradient and places of the extremes, factor, constant and slope to the gradients of kernel and
// bias and, as a third result or not at all, of x.
struct Backward {
  template <typename T>
  static void run(const Shape& shape, const Arrays<T>& of) {
    backward<T>(shape, of.in(0), of.in(1), of.in(2), of.in(3), of.in(4), of.template in<Place>(5), of.in(6), of.in(7),
                of.in(8), of.results.size() > 2 ? of.out(2) : nullptr, of.out(0), of.out(1));
  }
};

template <typename Work>
ffi::Error handle(ffi::RemainingArgs given, ffi::RemainingRets results, int64_t padding, int64_t window,
                  int64_t pool_padding, bool rectify, bool batch_first) {
  const auto x = given.get<ffi::AnyBuffer>(0), kernel = given.get<ffi::AnyBuffer>(1);
  const auto side = [](const auto& array, int axis) { return static_cast<int>(array->dimensions()[axis]); };
  const Shape shape = {side(x, batch_first ? 3 : 0),
                       side(x, 1),
                       side(x, 2),
                       side(x, batch_first ? 0 : 3),
                       side(kernel, 0),
                       side(kernel, 3),
                       static_cast<int>(padding),
                       static_cast<int>(window),
                       static_cast<int>(pool_padding),
                       rectify,
                       batch_first};
  try {
    if (x->element_type() == ffi::F64)
      Work::template run<double>(shape, {given, results});
    else
      Work::template run<float>(shape, {given, results});
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory in a convolution");
  }
  return ffi::Error::Success();
}

// Gradient and values of the extremes, mean and mask to the sums for the gradient of a normalisation.
ffi::Error handle_sums(ffi::RemainingArgs given, ffi::RemainingRets results) {
  const auto gradient = given.get<ffi::AnyBuffer>(0);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Arrays<T> of{given, results};
    const auto side = [&](int axis) { return static_cast<int>(gradient->dimensions()[axis]); };
    sums<T>(side(0), side(1) * side(2), side(3), of.in(0), of.in(1), of.in(2), of.in(3), of.out(0), of.out(1));
  };
  if (gradient->element_type() == ffi::F64)
    run(double());
  else
    run(float());
  return ffi::Error::Success();
}

}  // namespace

#define MER_JAX_HANDLER(name, Work)                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, handle<Work>,                \
                                ffi::Ffi::Bind()                   \
                                    .RemainingArgs()               \
                                    .RemainingRets()               \
                                    .Attr<int64_t>("padding")      \
                                    .Attr<int64_t>("window")       \
                                    .Attr<int64_t>("pool_padding") \
                                    .Attr<bool>("rectify")         \
                                    .Attr<bool>("batch_first"))

MER_JAX_HANDLER(mer_jax_extremes, Extremes);
MER_JAX_HANDLER(mer_jax_forward, Forward);
MER_JAX_HANDLER(mer_jax_backward, Backward);
XLA_FFI_DEFINE_HANDLER_SYMBOL(mer_jax_sums, handle_sums, ffi::Ffi::Bind().RemainingArgs().RemainingRets());
