#include "books.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "lanes.h"

namespace kvfold {
namespace {

constexpr double kRange = 32700;  // of an integer sum; each term, and each product of a rotation, may be rounded up

// For every head, sqrt(sum over groups of (sum over stages of the longest codeword)^2); the longest codewords' squares, rounded up.
std::vector<float> longest_vectors(const Books& books, const std::vector<float>& longest_square) {
  std::vector<float> result(books.heads);
  for (int64_t g = 0; g < books.heads; g++) {
    double square = 0;
    for (int64_t p = 0; p < books.groups; p++) {
      double sum = 0;
      for (int64_t s = 0; s < books.stages; s++)
        sum += std::sqrt(static_cast<double>(longest_square[books.book[g * books.codes() + s * books.groups + p]]));
      square += sum * sum;
    }
    result[g] = static_cast<float>(std::sqrt(square));
  }
  return result;
}

// The factor by which a float32 sum of `terms` positive products may be too small, at most.
float rounded_up(int64_t terms) { return 1 + static_cast<float>(terms + 2) * 1.2e-7f; }

// Codebook m turned: entry j of all codewords side by side, `[dim][padded size]`, codeword `order[c]` in place c, or c itself without an
// order; 0 where there is none (-1).
void turn(const Books& books, int64_t m, float* out, const int32_t* order = nullptr) {
  const int64_t dim = books.dim, whole = dim / lanes * lanes, width = books.padded_size();
  for (int64_t c = 0; c < width; c += lanes) {
    const float* rows[lanes];
    for (int i = 0; i < lanes; i++) {
      const int64_t of = order ? order[c + i] : c + i < books.size ? c + i : -1;
      rows[i] = of < 0 ? nullptr : books.table(m) + of * dim;
    }
    for (int64_t j = 0; j < whole; j += lanes) {
      vf square[lanes];
      for (int i = 0; i < lanes; i++) square[i] = rows[i] ? load(rows[i] + j) : vf{};
      transpose(square);
      for (int i = 0; i < lanes; i++) store(out + (j + i) * width + c, square[i]);
    }
    for (int64_t j = whole; j < dim; j++)
      for (int i = 0; i < lanes; i++) out[j * width + c + i] = rows[i] ? rows[i][j] : 0.0f;
  }
}

// Of rows that are turned, the squared length, summed in the order of the entries.
void squares(const float* turned, int64_t dim, int64_t width, float* out) {
  std::fill(out, out + width, 0.0f);
  for (int64_t j = 0; j < dim; j++)
    for (int64_t c = 0; c < width; c++) out[c] += turned[j * width + c] * turned[j * width + c];
}

Books::Integers make_integers(const Books& books) {
  Books::Integers made;
  const int64_t dim = books.dim, half = dim / 2;
  // Entries j and j + half are a pair that may be rotated: of either, no sum of one codeword a stage exceeds the sum over the
  // stages of the longest pair among the codewords, before the rotation or after it.
  std::vector<float> peak(books.count * half, 0.0f);  // squares
  for (int64_t m = 0; m < books.count; m++)
    for (int64_t c = 0; c < books.size; c++) {
      const float* codeword = books.table(m) + c * dim;
      float* of = peak.data() + m * half;
      for (int64_t j = 0; j < half; j++) {
        const float square = codeword[j] * codeword[j] + codeword[j + half] * codeword[j + half];
        of[j] = square > of[j] ? square : of[j];
      }
    }
  std::vector<double> reach(half, 0.0);
  for (int64_t g = 0; g < books.heads; g++)
    for (int64_t p = 0; p < books.groups; p++)
      for (int64_t j = 0; j < half; j++) {
        double sum = 0;
        for (int64_t s = 0; s < books.stages; s++)
          sum += std::sqrt(static_cast<double>(peak[books.book[g * books.codes() + s * books.groups + p] * half + j]));
        reach[j] = std::max(reach[j], sum);
      }
  made.step.resize(dim);
  for (int64_t j = 0; j < half; j++)
    made.step[j] = made.step[j + half] = static_cast<float>(reach[j] > 0 ? reach[j] / (kRange - 2 * books.stages) : 1.0);
  made.values.resize(books.rows.size());
  for (int64_t c = 0; c < books.count * books.size; c++)
    for (int64_t j = 0; j < dim; j++)
      made.values[c * dim + j] = static_cast<int16_t>(std::nearbyint(books.rows[c * dim + j] / made.step[j]));
  std::vector<float> longest(books.count, 0.0f);
  for (int64_t m = 0; m < books.count; m++)
    for (int64_t c = 0; c < books.size; c++) {
      int64_t square = 0;  // exact
      for (int64_t j = 0; j < dim; j++) {
        const int32_t x = made.values[(m * books.size + c) * dim + j];
        square += x * x;
      }
      longest[m] = std::max(longest[m], static_cast<float>(square) * rounded_up(1));
    }
  made.longest = longest_vectors(books, longest);
  return made;
}

Books::Pairs make_pairs(const Books& books) {
  const int64_t dim = books.dim, padded = books.padded_size();
  Books::Pairs made;
  made.pairs = (dim + 1) / 2;
  made.values.assign(books.count * made.pairs * padded * 2, 0);
  std::vector<float> turned(dim * padded), square(padded);
  float longest = 0;
  for (int64_t m = 0; m < books.count; m++) {
    turn(books, m, turned.data());
    vf most{};
    for (size_t i = 0; i < turned.size(); i += lanes) most = larger(most, larger(load(&turned[i]), -load(&turned[i])));
    float largest = 0;
    for (int i = 0; i < lanes; i++) largest = std::max(largest, most[i]);
    const float step = largest > 0 ? largest / 32767 : 1.0f;
    made.step.push_back(step);
    for (float& x : turned) x = std::nearbyint(x / step);
    for (int64_t j = 0; j < dim; j++) {
      int16_t* to = made.values.data() + (m * made.pairs + j / 2) * padded * 2 + j % 2;
      for (int64_t c = 0; c < padded; c++) to[c * 2] = static_cast<int16_t>(turned[j * padded + c]);
    }
    squares(turned.data(), dim, padded, square.data());
    longest = std::max(longest, *std::max_element(square.begin(), square.end()) * rounded_up(dim));
  }
  made.longest = std::sqrt(longest);
  return made;
}

Books::Tiles make_tiles(const Books& books) {
  const int64_t dim = books.dim, padded = books.padded_size(), sets = padded / 4;
  Books::Tiles made;
  made.parts = (dim + 31) / 32;
  made.halves.assign(books.count * padded * made.parts * 32, 0);
  made.half_norms.assign(books.count * padded, std::numeric_limits<float>::infinity());
  made.names.assign(books.count * padded + 1, 0);
  made.slope.assign(books.count * sets, 0.0f);
  // The sum of the half norms and the product is off by `unit` times |r|^2 / 2 + |r| |C| + |C|^2 / 2. If |C| > 4 |r|, the latter two are
  // less than 3 E, else than 3 |r| |C|.
  const double unit = static_cast<double>(made.parts * 32 + 16) * 6e-8;
  made.rounding = static_cast<float>(3 * unit);
  const float shrink = static_cast<float>(1.003 / 512 + 3 * unit);  // a vector's entries change by 2^-9 at most
  std::vector<float> turned(made.parts * 32 * padded, 0.0f), lost(padded);
  std::vector<int32_t> order(padded);
  std::vector<std::pair<float, int32_t>> slopes(books.size);
  for (int64_t m = 0; m < books.count; m++) {
    const float* half_norms = books.half_norms.data() + m * padded;
    turn(books, m, turned.data());
    for (float& x : turned) x -= from_bfloat16(to_bfloat16(x));
    squares(turned.data(), dim, padded, lost.data());
    for (int64_t c = 0; c < books.size; c++)
      slopes[c] = {(std::sqrt(lost[c]) + std::sqrt(2 * half_norms[c]) * shrink) * rounded_up(dim), static_cast<int32_t>(c)};
    std::sort(slopes.begin(), slopes.end());
    std::fill(order.begin(), order.end(), -1);
    for (int64_t rank = 0, start = 0; rank < books.size; rank++) {
      const int64_t set = rank * sets / books.size, c = slopes[rank].second;
      if (set != (rank - 1) * sets / books.size) start = rank;
      const int64_t place = set / 16 * 64 + (rank - start) * 16 + set % 16;
      order[place] = static_cast<int32_t>(c);
      made.half_norms[m * padded + place] = half_norms[c];
      made.names[m * padded + place] = static_cast<uint16_t>(c);
      made.slope[m * sets + set] = slopes[rank].first;  // they ascend
    }
    turn(books, m, turned.data(), order.data());
    for (int64_t j = 0; j < dim; j++)
      for (int64_t tile = 0; tile < padded / 16; tile++) {
        const float* from = turned.data() + j * padded + tile * 16;
        uint16_t* to = made.halves.data() + (m * padded / 16 + tile) * made.parts * 512 + j / 32 * 512 + j % 32 / 2 * 32 + j % 2;
        for (int64_t i = 0; i < 16; i++) to[i * 2] = to_bfloat16(-from[i]);
      }
  }
  return made;
}

Books::Splits make_splits(const Books& books) {
  Books::Splits made;
  bool exact = true;
  for (float x : books.rows) exact &= from_bfloat16(to_bfloat16(x)) == x;
  const int64_t padded = books.padded_size();
  made.parts = books.dim / 16, made.bunches = padded / 32, made.terms = exact ? 1 : 2;
  made.halves.resize(books.count * made.bunches * made.parts * made.terms * 512);
  std::vector<float> turned(books.dim * padded);
  for (int64_t m = 0; m < books.count; m++) {
    turn(books, m, turned.data());
    for (int64_t term = 0; term < made.terms; term++)
      for (int64_t bunch = 0; bunch < made.bunches; bunch++)
        for (int64_t j = 0; j < books.dim; j++) {
          uint16_t* to = made.halves.data() + (made.of(m, bunch, j / 16, term) - made.halves.data()) + j % 16 * 32;
          float* from = turned.data() + j * padded + bunch * 32;
          for (int64_t c = 0; c < 32; c++) {
            to[c] = to_bfloat16(from[c]);
            from[c] -= from_bfloat16(to[c]);
          }
        }
  }
  return made;
}

}  // namespace

Books::Books(const float* codebooks, int64_t count, int64_t size, int64_t dim, const int64_t* book, int64_t stages,
             int64_t heads, int64_t groups, const int64_t* channels)
    : count(0), size(size), dim(dim), stages(stages), heads(heads), groups(groups) {
  this->book.resize(heads * stages * groups);
  std::vector<int32_t> place(count, -1);
  rows.reserve(count * size * dim);
  for (int64_t g = 0; g < heads; g++)
    for (int64_t p = 0; p < groups; p++)
      for (int64_t s = 0; s < stages; s++) {
        const int64_t m = book[(s * heads + g) * groups + p];
        if (m < 0 || m >= count) throw std::invalid_argument("book names a codebook that is not there");
        if (place[m] < 0) {
          place[m] = static_cast<int32_t>(this->count++);
          rows.insert(rows.end(), codebooks + m * size * dim, codebooks + (m + 1) * size * dim);
        }
        this->book[g * stages * groups + s * groups + p] = place[m];
      }
  std::vector<bool> seen(groups * dim, false);
  for (int64_t i = 0; i < groups * dim; i++) {
    const int64_t channel = channels[i];
    if (channel < 0 || channel >= groups * dim || seen[channel])
      throw std::invalid_argument("channels are no permutation of the head's");
    seen[channel] = true;
    this->channels.push_back(static_cast<int32_t>(channel));
  }
  const int64_t padded = padded_size();
  half_norms.assign(this->count * padded, std::numeric_limits<float>::infinity());
  std::vector<float> longest_square(this->count), turned(dim * padded), square(padded);
  for (int64_t m = 0; m < this->count; m++) {
    turn(*this, m, turned.data());
    squares(turned.data(), dim, padded, square.data());
    longest_square[m] = *std::max_element(square.begin(), square.end()) * rounded_up(dim);
    for (int64_t c = 0; c < size; c++) half_norms[m * padded + c] = square[c] * 0.5f;
  }
  longest = longest_vectors(*this, longest_square);
}

const float* Books::columns(int64_t m) const {
  std::call_once(columns_made, [this] {
    columns_.resize(count * dim * padded_size());
    for (int64_t i = 0; i < count; i++) turn(*this, i, columns_.data() + i * dim * padded_size());
  });
  return columns_.data() + m * dim * padded_size();
}

const uint16_t* Books::halves() const {
  std::call_once(halves_made, [this] {
    Aligned<uint16_t> made(rows.size());
    for (size_t i = 0; i < rows.size(); i++) {
      made[i] = to_half(rows[i]);
      if (half_to_float(made[i]) != rows[i]) return;
    }
    halves_ = std::move(made);
  });
  return halves_.empty() ? nullptr : halves_.data();
}

const Books::Integers& Books::integers() const {
  std::call_once(integers_made, [this] { integers_ = make_integers(*this); });
  return integers_;
}

const Books::Pairs& Books::pairs() const {
  std::call_once(pairs_made, [this] { pairs_ = make_pairs(*this); });
  return pairs_;
}

const Books::Splits& Books::splits() const {
  std::call_once(splits_made, [this] { splits_ = make_splits(*this); });
  return splits_;
}

const Books::Tiles& Books::tiles() const {
  std::call_once(tiles_made, [this] { tiles_ = make_tiles(*this); });
  return tiles_;
}

}  // namespace kvfold
