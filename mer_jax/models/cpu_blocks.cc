// Convolution, batch statistics and max pooling of small maps on a CPU; called from cpu_blocks.py through XLA's FFI.
//
// The samples of a batch fill the lanes of a vector. As many samples as there are lanes are worked on at a time, so
// that what they need stays in the cache of a core, and row by row: a row of a map is convolved, summed up and pooled
// before the next one begins. Maps are not stored, and are computed again for the gradient. Sums of products are taken
// in tiles that fill the registers. One thread works on a call; a study has a member for every core.
//
// Arrays are as in convolution.py: x (C, H, W, B), kernel (k, k, C, F), pooled maps (F, H', W', B).

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
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
constexpr int kAcross = 3;         // pixels, or taps of the kernel, in a tile
constexpr int kPixelsAtOnce = 32;  // whose gradients are at hand when the kernel's is summed up

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

using Place = std::uint16_t;  // the number of a pixel in its pooling window

template <typename T>
struct Vectors {
  typedef T Own __attribute__((vector_size(kVectorBytes)));
  typedef double Wide __attribute__((vector_size(kLanes<T> * sizeof(double))));
  typedef Place Places __attribute__((vector_size(kLanes<T> * sizeof(Place))));
};
template <typename T>
using Vector = typename Vectors<T>::Own;
template <typename T>
using Wide = typename Vectors<T>::Wide;
template <typename T>
using Places = typename Vectors<T>::Places;

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

struct Shape {
  int channels, height, width, batch;  // of the input
  int size, features;                  // of the kernel
  int padding, window, pool_padding;
  bool rectify;

  int padded_height() const { return height + 2 * padding; }
  int padded_width() const { return width + 2 * padding; }
  std::size_t padded_plane() const { return static_cast<std::size_t>(padded_height()) * padded_width(); }
  int rows() const { return padded_height() - size + 1; }
  int columns() const { return padded_width() - size + 1; }
  int pooled_rows() const { return (rows() + 2 * pool_padding - window) / window + 1; }
  int pooled_columns() const { return (columns() + 2 * pool_padding - window) / window + 1; }
  int taps() const { return channels * size * size; }
  // The window that holds a row of the map, and the number of the row's first pixel within it.
  int window_of(int row) const { return (row + pool_padding) / window; }
  int place_of(int row) const { return (row + pool_padding) % window * window; }
};

int tiles(int features) { return (features + kFeatures - 1) / kFeatures; }

// Copies samples `start` and following of maps (C, H, W, B) between zeros, which stay; of samples that do not count, by
// a mask or because they are none, zeros as well, whatever they hold.
template <typename T>
void copy_within_zeros(const T* x, const Shape& shape, int start, int lanes, Vector<T> mask, Vector<T>* to) {
  const auto counts = mask != 0;
  const Vector<T> none = {};
  for (int c = 0; c < shape.channels; ++c)
    for (int h = 0; h < shape.height; ++h) {
      Vector<T>* row = to + c * shape.padded_plane() +
                       static_cast<std::size_t>(h + shape.padding) * shape.padded_width() + shape.padding;
      const T* from = x + (static_cast<std::size_t>(c) * shape.height + h) * shape.width * shape.batch + start;
      for (int w = 0; w < shape.width; ++w)
        row[w] = counts ? load(from + static_cast<std::size_t>(w) * shape.batch, lanes) : none;
    }
}

// Where the taps of a kernel lie, seen from a pixel: (C, k, k).
std::vector<std::ptrdiff_t> tap_offsets(int channels, int size, std::ptrdiff_t plane, std::ptrdiff_t row) {
  std::vector<std::ptrdiff_t> offsets;
  for (int c = 0; c < channels; ++c)
    for (int i = 0; i < size; ++i)
      for (int j = 0; j < size; ++j) offsets.push_back(c * plane + i * row + j);
  return offsets;
}

// A kernel (k, k, C, F) as (tile, C k k, features of a tile), filled up with zeros.
template <typename T>
std::vector<T> packed(const T* kernel, int size, int channels, int features) {
  const std::size_t taps = static_cast<std::size_t>(channels) * size * size;
  std::vector<T> weights(tiles(features) * taps * kFeatures, T(0));
  for (int i = 0; i < size; ++i)
    for (int j = 0; j < size; ++j)
      for (int c = 0; c < channels; ++c)
        for (int f = 0; f < features; ++f) {
          const std::size_t tap = (static_cast<std::size_t>(c) * size + i) * size + j;
          weights[(f / kFeatures * taps + tap) * kFeatures + f % kFeatures] =
              kernel[((static_cast<std::size_t>(i) * size + j) * channels + c) * features + f];
        }
  return weights;
}

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

// `kPixels` pixels of a row, for the features of a tile with `stride` between them.
template <typename T, int kPixels>
inline void convolve_tile(const Vector<T>* x, const std::vector<std::ptrdiff_t>& offsets, const T* weights,
                          Vector<T>* z, std::size_t stride) {
  Vector<T> sums[kFeatures][kPixels] = {};
  for (const std::ptrdiff_t offset : offsets) {
    Vector<T> pixels[kPixels];
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) pixels[p] = x[offset + p];
#pragma GCC unroll 16
    for (int f = 0; f < kFeatures; ++f) {
      const T weight = weights[f];
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) sums[f][p] += weight * pixels[p];
    }
    weights += kFeatures;
  }
#pragma GCC unroll 16
  for (int f = 0; f < kFeatures; ++f)
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) z[f * stride + p] = sums[f][p];
}

template <typename T>
void convolve_row(const Vector<T>* x, const std::vector<std::ptrdiff_t>& offsets, const T* weights, int columns,
                  Vector<T>* z, std::size_t stride) {
  int column = 0;
  for (; column + kAcross <= columns; column += kAcross)
    convolve_tile<T, kAcross>(x + column, offsets, weights, z + column, stride);
  for (; column < columns; ++column) convolve_tile<T, 1>(x + column, offsets, weights, z + column, stride);
}

// Maps of a tile of features, or their gradients: `stride` between features, `width` between rows.
template <typename T>
struct Tile {
  Vector<T>* at;
  std::size_t stride;
  int width, rows, columns;
};

// Adds the gradient of `kTaps` taps of the kernel: products of shifted inputs with gradients of the maps.
template <typename T, int kTaps>
inline void correlate_tile(const Vector<T>* x, const std::ptrdiff_t* offsets, int x_width, const Tile<T>& gradient,
                           Vector<T>* sums) {
  Vector<T> held[kTaps][kFeatures];
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 16
    for (int f = 0; f < kFeatures; ++f) held[t][f] = sums[t * kFeatures + f];
  for (int row = 0; row < gradient.rows; ++row, x += x_width) {
    const Vector<T>* at = gradient.at + static_cast<std::size_t>(row) * gradient.width;
    for (int column = 0; column < gradient.columns; ++column) {
      Vector<T> pixels[kTaps];
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t) pixels[t] = x[offsets[t] + column];
#pragma GCC unroll 16
      for (int f = 0; f < kFeatures; ++f) {
        Vector<T> of_feature = at[f * gradient.stride + column];
        MER_JAX_KEEP(of_feature);  // a load within each product would take longer than the products
#pragma GCC unroll 16
        for (int t = 0; t < kTaps; ++t) held[t][f] += pixels[t] * of_feature;
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 16
    for (int f = 0; f < kFeatures; ++f) sums[t * kFeatures + f] = held[t][f];
}

template <typename T>
void correlate(const Vector<T>* x, const std::vector<std::ptrdiff_t>& offsets, int x_width, const Tile<T>& gradient,
               Vector<T>* sums) {
  std::size_t tap = 0;
  for (; tap + kAcross <= offsets.size(); tap += kAcross)
    correlate_tile<T, kAcross>(x, offsets.data() + tap, x_width, gradient, sums + tap * kFeatures);
  for (; tap < offsets.size(); ++tap)
    correlate_tile<T, 1>(x, offsets.data() + tap, x_width, gradient, sums + tap * kFeatures);
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

  // Calls `visit(column, place in the window)` for all columns of windows, between `open(number)` and `close(number)`.
  // Whole windows are unrolled if kWindow is their side, not if it is 0.
  template <int kWindow, typename Open, typename Visit, typename Close>
  inline void each(Open open, Visit visit, Close close) const {
    const auto any = [&](int number) {
      const int first = number * window - pool_padding;
      open(number);
      for (int column = std::max(0, first); column < std::min(columns, first + window); ++column)
        visit(column, column - first);
      close(number);
    };
    int number = 0;
    for (; number < (kWindow ? begin : count); ++number) any(number);
    if (kWindow)
      for (; number < end; ++number) {
        open(number);
        for (int place = 0; place < kWindow; ++place) visit(number * kWindow - pool_padding + place, place);
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

// A feature as pooling sees it: the sign that makes minima maxima, the least response, and the windows of a row: their
// best values so far, and which pixels those are.
template <typename T>
struct Pooling {
  T sign, least;
  Vector<T>*best, *place;
};

// Pools a row of a feature, and adds its responses to the moments. Where there are none, what is not a number wins;
// where there are, it spoils them, and with them everything.
template <typename T, int kWindow, bool kRectify, bool kStatistics>
void pool_row(const Vector<T>* z, const Windows& windows, const Row& row, const Pooling<T>& pooling,
              Moments<T>* moments) {
  const Vector<T> pilot = kStatistics ? moments->pilot : Vector<T>{}, least = Vector<T>{} + pooling.least;
  Vector<T> sum = {}, square = {};
  const auto add = [&](Vector<T> value) MER_JAX_INLINED {
    if (!kStatistics) return;
    if (kRectify) value = value <= least ? least : value;  // not a number stays
    const Vector<T> deviation = value - pilot;
    sum += deviation;
    square += deviation * deviation;
  };
  int from = 0;
  if (row.pooled) {
    const Vector<T> none = Vector<T>{} - std::numeric_limits<T>::infinity();
    Vector<T> most, where;
    windows.each<kWindow>(
        [&](int number) MER_JAX_INLINED {
          most = row.first ? none : pooling.best[number];
          where = row.first ? Vector<T>{} : pooling.place[number];
        },
        [&](int column, int place) MER_JAX_INLINED {
          const Vector<T> value = pooling.sign * z[column];
          const auto wins = kStatistics ? value > most : (value > most) | (value != value);
          most = wins ? value : most;
          where = wins ? Vector<T>{} + T(row.place + place) : where;
          add(z[column]);
        },
        [&](int number) MER_JAX_INLINED { pooling.best[number] = most, pooling.place[number] = where; });
    from = windows.covered();
  }
  if (!kStatistics) return;
  for (int column = from; column < windows.columns; ++column) add(z[column]);
  moments->sum += __builtin_convertvector(sum, Wide<T>);
  moments->square += __builtin_convertvector(square, Wide<T>);
}

template <typename T>
using PoolRow = void (*)(const Vector<T>*, const Windows&, const Row&, const Pooling<T>&, Moments<T>*);

template <typename T, int kWindow>
PoolRow<T> pool_row_for(bool rectify, bool statistics) {
  if (!statistics) return pool_row<T, kWindow, false, false>;
  return rectify ? pool_row<T, kWindow, true, true> : pool_row<T, kWindow, false, true>;
}

// The gradient of a feature's responses: `factor given` of the winners of a row's windows less `constant + slope
// response` of all; none where a ReLU is closed, and none of samples beyond the mask.
template <typename T>
struct Gradient {
  T least, factor, constant, slope;
  Vector<T> mask;
  const T* given;
  const Place* place;
  int batch, lanes;
};

// Turns a row of a feature into its gradient, and returns the row's sum.
template <typename T, int kWindow, bool kRectify>
Vector<T> gradient_row(Vector<T>* z, const Windows& windows, const Row& row, const Gradient<T>& of) {
  const auto counts = of.mask != 0;
  const Vector<T> none = {}, least = counts ? none + of.least : none + std::numeric_limits<T>::infinity();
  const Vector<T> constant = none + of.constant, slope = none + of.slope;
  Vector<T> sum = {};
  const auto turn = [&](int column, Vector<T> sparse) MER_JAX_INLINED {
    const Vector<T> value = z[column];
    Vector<T> gradient = sparse - (constant + slope * value);
    if (kRectify) {
      gradient = value > least ? gradient : none;
      sum += gradient;
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
          const std::size_t at = static_cast<std::size_t>(number) * of.batch;
          winner = __builtin_convertvector(load_as<Places<T>>(of.place + at, of.lanes), Vector<T>);
          value = of.factor * load(of.given + at, of.lanes);
        },
        [&](int column, int place) MER_JAX_INLINED { turn(column, winner == T(row.place + place) ? value : none); },
        [](int) {});
    from = windows.covered();
  }
  for (int column = from; column < windows.columns; ++column) turn(column, none);
  return sum;
}

template <typename T>
using GradientRow = Vector<T> (*)(Vector<T>*, const Windows&, const Row&, const Gradient<T>&);

template <typename T, int kWindow>
GradientRow<T> gradient_row_for(bool rectify) {
  return rectify ? gradient_row<T, kWindow, true> : gradient_row<T, kWindow, false>;
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
  const std::size_t padded_count = shape.channels * shape.padded_plane();
  Vector<T>*padded, *z, *best, *where;
  scratch.take<T>({{&padded, padded_count},
                   {&z, static_cast<std::size_t>(kFeatures) * columns},
                   {&best, pooled},
                   {&where, pooled}});
  clear<T>(padded, padded_count);
  const auto offsets = tap_offsets(shape.channels, shape.size, shape.padded_plane(), shape.padded_width());
  const auto weights = packed(kernel, shape.size, shape.channels, shape.features);
  const Windows windows(shape);
  const PoolRow<T> pool = shape.window == 3   ? pool_row_for<T, 3>(shape.rectify, mean)
                          : shape.window == 2 ? pool_row_for<T, 2>(shape.rectify, mean)
                                              : pool_row_for<T, 0>(shape.rectify, mean);
  std::vector<Moments<T>> moments(shape.features);
  std::vector<double> means(shape.features, 0.0), deviations(shape.features, 0.0);
  const double pixels = static_cast<double>(rows) * columns;
  double count = 0.0;
  for (int start = 0; start < shape.batch; start += kLanes<T>) {
    const int lanes = std::min(kLanes<T>, shape.batch - start);
    copy_within_zeros(x, shape, start, lanes, mask ? load(mask + start, lanes) : Vector<T>{} + T(1), padded);
    for (int row = 0; row < rows; ++row) {
      const int window_row = shape.window_of(row);
      const Row of_row(shape, row);
      for (int f = 0; f < shape.features; ++f) {
        const Vector<T>* of_feature = z + static_cast<std::size_t>(f % kFeatures) * columns;
        if (f % kFeatures == 0)
          convolve_row<T>(padded + static_cast<std::size_t>(row) * shape.padded_width(), offsets,
                          weights.data() + f * offsets.size(), columns, z, columns);
        if (row == 0) {
          const Vector<T> pilot = of_feature[columns / 2], least = Vector<T>{} - bias[f];
          moments[f] = {shape.rectify ? (pilot <= least ? least : pilot) : pilot, Wide<T>{}, Wide<T>{}};
        }
        const std::size_t at = static_cast<std::size_t>(f) * pooled_columns;
        pool(of_feature, windows, of_row, {scale[f] < 0 ? T(-1) : T(1), -bias[f], best + at, where + at}, &moments[f]);
      }
      if (!of_row.pooled || (row < rows - 1 && !Row(shape, row + 1).first)) continue;
      for (int f = 0; f < shape.features; ++f) {
        const T sign = scale[f] < 0 ? T(-1) : T(1);
        const Vector<T> least = Vector<T>{} - bias[f];
        for (int column = 0; column < pooled_columns; ++column) {
          const std::size_t from = static_cast<std::size_t>(f) * pooled_columns + column;
          const std::size_t to = (static_cast<std::size_t>(f) * pooled_rows + window_row) * pooled_columns + column;
          Vector<T> value = sign * best[from];
          if (shape.rectify) value = value <= least ? least : value;
          store(extreme + to * shape.batch + start, value, lanes);
          if (place) store(place + to * shape.batch + start, __builtin_convertvector(where[from], Places<T>), lanes);
        }
      }
    }
    // Chan, Golub and LeVeque 1979: deviations of the parts, here samples, and of their means.
    for (int lane = 0; mean && lane < lanes; ++lane) {
      if (mask[start + lane] == 0) continue;
      const double before = count;
      count += pixels;
      for (int f = 0; f < shape.features; ++f) {
        const double sum = moments[f].sum[lane], beyond = sum / pixels;
        const double delta = moments[f].pilot[lane] + beyond - means[f];
        means[f] += delta * pixels / count;
        deviations[f] += moments[f].square[lane] - sum * beyond + delta * delta * before * pixels / count;
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
  const int rows = shape.rows(), columns = shape.columns(), taps = shape.taps();
  const int pooled_rows = shape.pooled_rows(), pooled_columns = shape.pooled_columns();
  const int features = tiles(shape.features) * kFeatures;
  // All gradients of the maps are kept, between zeros, for that of x; else those of some rows.
  const int at_once = std::min(rows, std::max(1, kPixelsAtOnce / columns));
  const int around = x_gradient ? shape.size - 1 - shape.padding : 0;
  const int z_width = columns + 2 * around, z_rows = x_gradient ? rows + 2 * around : at_once;
  const std::size_t z_plane = static_cast<std::size_t>(z_rows) * z_width;
  const std::size_t padded_count = shape.channels * shape.padded_plane();
  Vector<T>*padded, *z, *sums, *bias_sums, *back;
  scratch.take<T>({{&padded, padded_count},
                   {&z, features * z_plane},
                   {&sums, static_cast<std::size_t>(taps) * features},
                   {&bias_sums, static_cast<std::size_t>(features)},
                   {&back, static_cast<std::size_t>(kFeatures) * shape.width}});
  clear<T>(padded, padded_count);
  clear<T>(z, features * z_plane);
  const auto offsets = tap_offsets(shape.channels, shape.size, shape.padded_plane(), shape.padded_width());
  const auto weights = packed(kernel, shape.size, shape.channels, shape.features);
  std::vector<std::ptrdiff_t> back_offsets;
  std::vector<T> back_weights;
  if (x_gradient) {
    const auto of_back = turned(kernel, shape.size, shape.channels, shape.features);
    back_offsets = tap_offsets(shape.features, shape.size, z_plane, z_width);
    back_weights = packed(of_back.data(), shape.size, shape.features, shape.channels);
  }
  const Windows windows(shape);
  const GradientRow<T> to_gradient = shape.window == 3   ? gradient_row_for<T, 3>(shape.rectify)
                                     : shape.window == 2 ? gradient_row_for<T, 2>(shape.rectify)
                                                         : gradient_row_for<T, 0>(shape.rectify);
  std::vector<double> totals(static_cast<std::size_t>(taps) * features, 0.0), bias_totals(shape.features, 0.0);
  for (int start = 0; start < shape.batch; start += kLanes<T>) {
    const int lanes = std::min(kLanes<T>, shape.batch - start);
    const Vector<T> valid = load(mask + start, lanes);
    copy_within_zeros(x, shape, start, lanes, valid, padded);
    clear<T>(sums, static_cast<std::size_t>(taps) * features);
    clear<T>(bias_sums, features);
    for (int first = 0; first < rows; first += at_once) {
      const int last = std::min(rows, first + at_once);
      for (int begin = 0; begin < shape.features; begin += kFeatures) {
        Vector<T>* of_tile = z + begin * z_plane;
        if (x_gradient) of_tile += static_cast<std::size_t>(first + around) * z_width + around;
        for (int row = first; row < last; ++row) {
          Vector<T>* of_row = of_tile + static_cast<std::size_t>(row - first) * z_width;
          convolve_row<T>(padded + static_cast<std::size_t>(row) * shape.padded_width(), offsets,
                          weights.data() + static_cast<std::size_t>(begin) * taps, columns, of_row, z_plane);
          for (int f = begin; f < std::min(shape.features, begin + kFeatures); ++f) {
            const std::size_t at =
                (static_cast<std::size_t>(f) * pooled_rows + shape.window_of(row)) * pooled_columns * shape.batch +
                start;
            bias_sums[f] += to_gradient(
                of_row + (f - begin) * z_plane, windows, Row(shape, row),
                {-bias[f], factor[f], constant[f], slope[f], valid, given + at, place + at, shape.batch, lanes});
          }
        }
        correlate<T>(padded + static_cast<std::size_t>(first) * shape.padded_width(), offsets, shape.padded_width(),
                     {of_tile, z_plane, z_width, last - first, columns}, sums + static_cast<std::size_t>(begin) * taps);
      }
    }
    for (std::size_t at = 0; at < totals.size(); ++at)
      for (int lane = 0; lane < kLanes<T>; ++lane) totals[at] += sums[at][lane];
    for (int f = 0; f < shape.features; ++f)
      for (int lane = 0; lane < kLanes<T>; ++lane) bias_totals[f] += bias_sums[f][lane];
    for (int row = 0; x_gradient && row < shape.height; ++row)
      for (int c = 0; c < shape.channels; ++c) {
        if (c % kFeatures == 0)
          convolve_row<T>(z + static_cast<std::size_t>(row) * z_width, back_offsets,
                          back_weights.data() + c * back_offsets.size(), shape.width, back, shape.width);
        T* to = x_gradient + (static_cast<std::size_t>(c) * shape.height + row) * shape.width * shape.batch + start;
        for (int column = 0; column < shape.width; ++column)
          store(to + static_cast<std::size_t>(column) * shape.batch, back[c % kFeatures * shape.width + column], lanes);
      }
  }
  for (int f = 0; f < shape.features; ++f) {
    bias_gradient[f] = shape.rectify ? static_cast<T>(bias_totals[f]) : T(0);
    for (int c = 0; c < shape.channels; ++c)
      for (int i = 0; i < shape.size; ++i)
        for (int j = 0; j < shape.size; ++j) {
          const std::size_t tap = (static_cast<std::size_t>(c) * shape.size + i) * shape.size + j;
          kernel_gradient[((static_cast<std::size_t>(i) * shape.size + j) * shape.channels + c) * shape.features + f] =
              static_cast<T>(
                  totals[(f / kFeatures * static_cast<std::size_t>(taps) + tap) * kFeatures + f % kFeatures]);
        }
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
                  int64_t pool_padding, bool rectify) {
  const auto x = given.get<ffi::AnyBuffer>(0), kernel = given.get<ffi::AnyBuffer>(1);
  const auto side = [](const auto& array, int axis) { return static_cast<int>(array->dimensions()[axis]); };
  const Shape shape = {side(x, 0),
                       side(x, 1),
                       side(x, 2),
                       side(x, 3),
                       side(kernel, 0),
                       side(kernel, 3),
                       static_cast<int>(padding),
                       static_cast<int>(window),
                       static_cast<int>(pool_padding),
                       rectify};
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

}  // namespace

#define MER_JAX_HANDLER(name, Work)                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, handle<Work>,                \
                                ffi::Ffi::Bind()                   \
                                    .RemainingArgs()               \
                                    .RemainingRets()               \
                                    .Attr<int64_t>("padding")      \
                                    .Attr<int64_t>("window")       \
                                    .Attr<int64_t>("pool_padding") \
                                    .Attr<bool>("rectify"))

MER_JAX_HANDLER(mer_jax_extremes, Extremes);
MER_JAX_HANDLER(mer_jax_forward, Forward);
MER_JAX_HANDLER(mer_jax_backward, Backward);
