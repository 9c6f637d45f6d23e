// Residual nearest-codeword search, greedy and with a beam; the definition is ops/encode/naive.py.
//
// Vectors go through all stages in blocks that stay in the second-level cache. The scores of a block are a matrix product
// over a strip of codewords, of which only the best of each vector is kept as it comes (greedy), or which is written out a
// vector at a time (beam).
#include "encode_amx.h"
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

namespace kvfold {
namespace {

constexpr int kRows = 4;                // vectors of a tile of the product
constexpr int kWide = 4;                // lane vectors of a tile: codewords
constexpr int kStrip = kWide * lanes;   // codewords of a tile
constexpr int64_t kBlock = 64;          // vectors of a piece of work

// `x . C[c] - ||C[c]||^2 / 2` of kRows vectors (row stride `dim`) for one strip of codewords.
inline void score(const float* x, int64_t dim, const float* columns, const float* half_norms, int64_t padded,
                  vf (&acc)[kRows][kWide]) {
  for (int r = 0; r < kRows; r++)
    for (int w = 0; w < kWide; w++) acc[r][w] = vf{} - load(half_norms + w * lanes);
  for (int64_t j = 0; j < dim; j++) {
    vf column[kWide];
    for (int w = 0; w < kWide; w++) column[w] = hold(load(columns + j * padded + w * lanes));
    for (int r = 0; r < kRows; r++) {
      const vf entry = splat(x[r * dim + j]);
      for (int w = 0; w < kWide; w++) acc[r][w] += entry * column[w];
    }
  }
}

struct Stage {
  const float *columns, *half_norms, *rows;
};

// Best codeword of each of `count` vectors (`x` has room for a multiple of kRows); ties go to the lowest index.
void nearest(const float* x, int64_t count, int64_t dim, const Stage& stage, int64_t padded, int32_t* best) {
  for (int64_t first = 0; first < count; first += kRows) {
    vf top[kRows];
    vi place[kRows];
    for (int r = 0; r < kRows; r++) {
      top[r] = splat(-std::numeric_limits<float>::infinity());
      place[r] = vi{};
    }
    vi index;
    for (int i = 0; i < lanes; i++) index[i] = i;
    for (int64_t c = 0; c < padded; c += kStrip) {
      vf acc[kRows][kWide];
      score(x + first * dim, dim, stage.columns + c, stage.half_norms + c, padded, acc);
      for (int w = 0; w < kWide; w++) {
        for (int r = 0; r < kRows; r++) {
          const vi better = acc[r][w] > top[r];
          top[r] = better ? acc[r][w] : top[r];
          place[r] = better ? index : place[r];
        }
        index += lanes;
      }
    }
    for (int r = 0; r < std::min<int64_t>(kRows, count - first); r++) {
      float value = top[r][0];
      int32_t found = place[r][0];
      for (int i = 1; i < lanes; i++)
        if (top[r][i] > value || (top[r][i] == value && place[r][i] < found)) {
          value = top[r][i];
          found = place[r][i];
        }
      best[first + r] = found;
    }
  }
}

void encode_greedy(const EncodeCall& call, const std::vector<Stage>& stages, int64_t count, float* x, int32_t* codes) {
  const Books& books = *call.books;
  const int64_t dim = books.dim;
  for (size_t s = 0; s < stages.size(); s++) {
    int32_t* best = codes + s * kBlock;
    nearest(x, count, dim, stages[s], books.padded_size(), best);
    for (int64_t i = 0; i < count; i++) {
      const float* codeword = stages[s].rows + best[i] * dim;
      float* residual = x + i * dim;
      for (int64_t j = 0; j < dim; j++) residual[j] -= codeword[j];
    }
  }
}

// A partial code: its squared error, and what it is made of.
struct Partial {
  float error;
  int32_t parent, code;
};

// What is kept of one vector between stages: up to `beam` partial codes and their residuals.
struct Beam {
  Aligned<float> residual, next_residual;  // [beam + kRows][dim]
  std::vector<int32_t> codes, next_codes;  // [beam][stages]
  int64_t width = 1;

  Beam(const float* x, int64_t beam, int64_t dim, int64_t stages)
      : residual((beam + kRows) * dim, 0.0f), next_residual(residual), codes(beam * stages), next_codes(codes) {
    std::copy_n(x, dim, residual.begin());
  }
};

struct BeamSpace {
  Aligned<float> errors;      // [beam + kRows][padded]
  std::vector<Partial> best;  // ascending; of equal errors those that came first
  std::vector<float> lowest, least;  // of disjoint sets of candidates

  BeamSpace(int64_t beam, int64_t padded) : errors((beam + kRows) * padded), best(beam), lowest(kStrip), least(beam) {}
};

float square_of(const float* x, int64_t dim) {
  vf total = vf{};
  int64_t j = 0;
  for (; j + lanes <= dim; j += lanes) total += load(x + j) * load(x + j);
  float result = sum(total);
  for (; j < dim; j++) result += x[j] * x[j];
  return result;
}

// Errors of all continuations of `width` partial codes, `[width][padded]`. Returns an error that at least `beam` of them do
// not exceed, if that can be told from the lowest of kStrip disjoint sets, else infinity.
float all_errors(const Stage& stage, int64_t dim, int64_t padded, const float* residuals, int64_t width, int64_t beam,
                 BeamSpace& space) {
  const float infinity = std::numeric_limits<float>::infinity();
  vf lowest[kWide];
  for (vf& low : lowest) low = splat(infinity);
  for (int64_t first = 0; first < width; first += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, width - first);
    const float* residual = residuals + first * dim;
    float square[kRows] = {};
    for (int64_t r = 0; r < rows; r++) square[r] = square_of(residual + r * dim, dim);
    for (int64_t c = 0; c < padded; c += kStrip) {
      vf acc[kRows][kWide];
      score(residual, dim, stage.columns + c, stage.half_norms + c, padded, acc);
      for (int64_t r = 0; r < rows; r++)
        for (int w = 0; w < kWide; w++) {
          const vf error = square[r] - 2.0f * acc[r][w];
          lowest[w] = error < lowest[w] ? error : lowest[w];
          store(space.errors.data() + (first + r) * padded + c + w * lanes, error);
        }
    }
  }
  if (beam > kStrip) return infinity;
  int64_t sets = kStrip;
  if (4 * beam <= lanes) {  // fewer sets tell nearly as much, sooner
    for (int w = 1; w < kWide; w++) lowest[0] = lowest[w] < lowest[0] ? lowest[w] : lowest[0];
    sets = lanes;
  }
  for (int w = 0; w < kWide; w++) store(space.lowest.data() + w * lanes, lowest[w]);
  float* least = space.least.data();  // the `beam` least, ascending
  std::fill_n(least, beam, infinity);
  for (int64_t i = 0; i < sets; i++) {
    const float error = space.lowest[i];
    if (!(error < least[beam - 1])) continue;
    int64_t at = beam - 1;
    for (; at > 0 && least[at - 1] > error; at--) least[at] = least[at - 1];
    least[at] = error;
  }
  return least[beam - 1];
}

// The `beam` best of all continuations into `space.best`; returns how many there are.
int64_t choose(int64_t size, int64_t padded, int64_t width, int64_t beam, float limit, BeamSpace& space) {
  Partial* best = space.best.data();
  int64_t filled = 0;
  for (int64_t parent = 0; parent < width; parent++)
    for (int64_t c = 0; c < padded; c += lanes) {
      const float* errors = space.errors.data() + parent * padded + c;
      for (uint32_t left = bits(load(errors) <= limit); left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        if (c + i >= size || (filled == beam && errors[i] >= best[beam - 1].error)) continue;
        int64_t at = filled < beam ? filled++ : beam - 1;
        for (; at > 0 && best[at - 1].error > errors[i]; at--) best[at] = best[at - 1];
        best[at] = {errors[i], static_cast<int32_t>(parent), static_cast<int32_t>(c + i)};
      }
      if (filled == beam) limit = std::min(limit, best[beam - 1].error);
    }
  return filled;
}

// Stage by stage for all of a block, so that a stage's codewords stay in the first-level cache; codes [count][stages].
void encode_beam(const EncodeCall& call, const std::vector<Stage>& stages, int64_t count, const float* x, int32_t* codes) {
  const Books& books = *call.books;
  const int64_t dim = books.dim, padded = books.padded_size(), depth = static_cast<int64_t>(stages.size());
  BeamSpace space(call.beam, padded);
  std::vector<Beam> beams;
  for (int64_t i = 0; i < count; i++) beams.emplace_back(x + i * dim, call.beam, dim, depth);
  for (int64_t s = 0; s < depth; s++)
    for (Beam& beam : beams) {
      const float limit = all_errors(stages[s], dim, padded, beam.residual.data(), beam.width, call.beam, space);
      beam.width = choose(books.size, padded, beam.width, call.beam, limit, space);
      for (int64_t i = 0; i < beam.width; i++) {
        const Partial& partial = space.best[i];
        const float* from = beam.residual.data() + partial.parent * dim;
        const float* codeword = stages[s].rows + partial.code * dim;
        float* to = beam.next_residual.data() + i * dim;
        for (int64_t j = 0; j < dim; j++) to[j] = from[j] - codeword[j];
        std::copy_n(beam.codes.data() + partial.parent * depth, s, beam.next_codes.data() + i * depth);
        beam.next_codes[i * depth + s] = partial.code;
      }
      beam.residual.swap(beam.next_residual);
      beam.codes.swap(beam.next_codes);
    }
  for (int64_t i = 0; i < count; i++) std::copy_n(beams[i].codes.data(), depth, codes + i * depth);
}

#if defined(__AMX_BF16__)
// Encoders with their memory, lent to one piece of work at a time: there are as many as work at once.
class AmxEncoders {
 public:
  explicit AmxEncoders(const EncodeCall& call) : call_(call) {}

  std::unique_ptr<AmxEncoder> take() {
    std::lock_guard<std::mutex> lock(guard_);
    if (idle_.empty()) return std::make_unique<AmxEncoder>(*call_.books, call_.beam, kBlock);
    std::unique_ptr<AmxEncoder> encoder = std::move(idle_.back());
    idle_.pop_back();
    return encoder;
  }

  void give(std::unique_ptr<AmxEncoder> encoder) {
    std::lock_guard<std::mutex> lock(guard_);
    idle_.push_back(std::move(encoder));
  }

 private:
  const EncodeCall& call_;
  std::mutex guard_;
  std::vector<std::unique_ptr<AmxEncoder>> idle_;
};
#endif

}  // namespace

void encode(const EncodeCall& call) {
  const Books& books = *call.books;
  const int64_t depth = books.stages, groups = books.groups, dim = books.dim, heads = books.heads;
  const int64_t blocks = (call.tokens + kBlock - 1) / kBlock;
#if defined(__AMX_BF16__)
  AmxEncoders encoders(call);
#endif
  // A piece of work is one block of tokens of one head and group: neighbours in the order share a codebook column.
  parallel_for(call.threads, call.batch * heads * groups * blocks, [&](int64_t item) {
    const int64_t block = item % blocks, p = item / blocks % groups, pair = item / blocks / groups;
    const int64_t first = block * kBlock, count = std::min(kBlock, call.tokens - first);
    const int32_t* book = books.book.data() + pair % heads * books.codes();
    const float* from = call.vectors + ((pair * call.tokens + first) * groups + p) * dim;
    int32_t* to = call.codes + (pair * call.tokens + first) * books.codes() + p;
#if defined(__AMX_BF16__)
    if (AmxEncoder::serves(call)) {
      std::unique_ptr<AmxEncoder> encoder = encoders.take();
      encoder->encode({from, groups * dim, count, book + p, groups, to, books.codes(), groups});
      encoders.give(std::move(encoder));
      return;
    }
#endif
    Aligned<float> x(kBlock * dim, 0.0f);
    for (int64_t i = 0; i < count; i++) std::copy_n(from + i * groups * dim, dim, x.data() + i * dim);
    std::vector<Stage> stages;
    for (int64_t s = 0; s < depth; s++) {
      const int64_t m = book[s * groups + p];
      stages.push_back({books.columns(m), books.half_norms.data() + m * books.padded_size(), books.table(m)});
    }
    if (call.beam == 1) {
      std::vector<int32_t> codes(depth * kBlock);
      encode_greedy(call, stages, count, x.data(), codes.data());
      for (int64_t i = 0; i < count; i++)
        for (int64_t s = 0; s < depth; s++) to[i * books.codes() + s * groups] = codes[s * kBlock + i];
    } else {
      std::vector<int32_t> codes(count * depth);
      encode_beam(call, stages, count, x.data(), codes.data());
      for (int64_t i = 0; i < count; i++)
        for (int64_t s = 0; s < depth; s++) to[i * books.codes() + s * groups] = codes[i * depth + s];
    }
  });
}

}  // namespace kvfold
