// Residual nearest-codeword search, greedy and with a beam; the definition is ops/encode/naive.py.
//
// Vectors go through all stages in blocks that stay in the second-level cache. The scores of a block are a matrix product
// over a strip of codewords, of which only the best of each vector is kept as it comes (greedy), or which is written out a
// vector at a time (beam).
#include "encode.h"

#include "encode_amx.h"
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace kvfold {
namespace {

constexpr int kRows = 4;                // vectors of a tile of the product
constexpr int kWide = 4;                // lane vectors of a tile: codewords
constexpr int kStrip = kWide * lanes;   // codewords of a tile

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

void encode_greedy(const Books& books, const std::vector<Stage>& stages, int64_t count, float* x, int32_t* codes) {
  const int64_t dim = books.dim;
  for (size_t s = 0; s < stages.size(); s++) {
    int32_t* best = codes + s * Searcher::kLanes;
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
void encode_beam(const Books& books, int64_t most, const std::vector<Stage>& stages, int64_t count, const float* x, int32_t* codes) {
  const int64_t dim = books.dim, padded = books.padded_size(), depth = static_cast<int64_t>(stages.size());
  BeamSpace space(most, padded);
  std::vector<Beam> beams;
  for (int64_t i = 0; i < count; i++) beams.emplace_back(x + i * dim, most, dim, depth);
  for (int64_t s = 0; s < depth; s++)
    for (Beam& beam : beams) {
      const float limit = all_errors(stages[s], dim, padded, beam.residual.data(), beam.width, most, space);
      beam.width = choose(books.size, padded, beam.width, most, limit, space);
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

}  // namespace

#if defined(__AMX_BF16__)
class Searcher::Amx : public AmxEncoder {
 public:
  using AmxEncoder::AmxEncoder;
};
#else
class Searcher::Amx {};
#endif

Searcher::Searcher(const Books& books, int64_t beam) : books_(books), beam_(beam) {
#if defined(__AMX_BF16__)
  if (AmxEncoder::serves(beam)) amx_ = std::make_unique<Amx>(books, beam);
#endif
}

Searcher::~Searcher() = default;

void Searcher::encode(const float* vectors, int64_t stride, int64_t count, int64_t g, int64_t p, int32_t* codes) {
  const int32_t* book = books_.book.data() + g * books_.codes() + p;
#if defined(__AMX_BF16__)
  if (amx_) return amx_->encode({vectors, stride, count, book, books_.groups, codes + p, books_.codes(), books_.groups});
#endif
  for (int64_t i = 0; i < count; i += kLanes)
    encode_lanes(vectors + i * stride, stride, std::min(kLanes, count - i), book, codes + i * books_.codes() + p);
}

void Searcher::encode_lanes(const float* vectors, int64_t stride, int64_t count, const int32_t* book, int32_t* codes) {
  const int64_t depth = books_.stages, groups = books_.groups, dim = books_.dim;
  Aligned<float> x(kLanes * dim, 0.0f);
  for (int64_t i = 0; i < count; i++) std::copy_n(vectors + i * stride, dim, x.data() + i * dim);
  std::vector<Stage> stages;
  for (int64_t s = 0; s < depth; s++) {
    const int64_t m = book[s * groups];
    stages.push_back({books_.columns(m), books_.half_norms.data() + m * books_.padded_size(), books_.table(m)});
  }
  if (beam_ == 1) {
    std::vector<int32_t> found(depth * kLanes);
    encode_greedy(books_, stages, count, x.data(), found.data());
    for (int64_t i = 0; i < count; i++)
      for (int64_t s = 0; s < depth; s++) codes[i * books_.codes() + s * groups] = found[s * kLanes + i];
  } else {
    std::vector<int32_t> found(count * depth);
    encode_beam(books_, beam_, stages, count, x.data(), found.data());
    for (int64_t i = 0; i < count; i++)
      for (int64_t s = 0; s < depth; s++) codes[i * books_.codes() + s * groups] = found[i * depth + s];
  }
}

void encode(const EncodeCall& call) {
  const Books& books = *call.books;
  const int64_t groups = books.groups, dim = books.dim, blocks = (call.tokens + Searcher::kBlock - 1) / Searcher::kBlock;
  Lent<Searcher> searchers(books, call.beam);
  // A piece of work is one block of tokens of one head and group: neighbours in the order share codebooks.
  parallel_stretches(call.threads, call.batch * books.heads * groups * blocks, [&](int64_t item) {
    const int64_t p = item / blocks % groups, pair = item / blocks / groups;
    const int64_t first = item % blocks * Searcher::kBlock, count = std::min(Searcher::kBlock, call.tokens - first);
    const float* from = call.vectors + ((pair * call.tokens + first) * groups + p) * dim;
    Lent<Searcher>::Loan searcher(searchers);
    searcher->encode(from, groups * dim, count, pair % books.heads, p, call.codes + (pair * call.tokens + first) * books.codes());
  });
}

}  // namespace kvfold
