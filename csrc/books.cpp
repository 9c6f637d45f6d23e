#include "books.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace kvfold {
namespace {

constexpr double kRange = 32700;  // of an integer sum; each term, and each product of a rotation, may be rounded up

// For every head, sqrt(sum over groups of (sum over stages of the longest codeword)^2).
std::vector<float> longest_vectors(const Books& books, const std::vector<double>& longest_codeword) {
  std::vector<float> result(books.heads);
  for (int64_t g = 0; g < books.heads; g++) {
    double square = 0;
    for (int64_t p = 0; p < books.groups; p++) {
      double sum = 0;
      for (int64_t s = 0; s < books.stages; s++) sum += longest_codeword[books.book[g * books.codes() + s * books.groups + p]];
      square += sum * sum;
    }
    result[g] = static_cast<float>(std::sqrt(square));
  }
  return result;
}

template <class Table>
std::vector<double> longest_codewords(const Books& books, const Table& table) {
  std::vector<double> result(books.count, 0.0);
  for (int64_t m = 0; m < books.count; m++)
    for (int64_t c = 0; c < books.size; c++) {
      double square = 0;
      for (int64_t j = 0; j < books.dim; j++) {
        const double x = table[(m * books.size + c) * books.dim + j];
        square += x * x;
      }
      result[m] = std::max(result[m], std::sqrt(square));
    }
  return result;
}

Books::Integers make_integers(const Books& books) {
  Books::Integers made;
  const int64_t dim = books.dim, half = dim / 2;
  // Entries j and j + half are a pair that may be rotated: of either, no sum of one codeword a stage exceeds the sum over the
  // stages of the longest pair among the codewords, before the rotation or after it.
  std::vector<double> reach(half, 0.0), peak(books.count * half, 0.0);
  for (int64_t m = 0; m < books.count; m++)
    for (int64_t c = 0; c < books.size; c++)
      for (int64_t j = 0; j < half; j++) {
        const float* codeword = books.table(m) + c * dim;
        peak[m * half + j] = std::max<double>(peak[m * half + j], std::hypot(codeword[j], codeword[j + half]));
      }
  for (int64_t g = 0; g < books.heads; g++)
    for (int64_t p = 0; p < books.groups; p++)
      for (int64_t j = 0; j < half; j++) {
        double sum = 0;
        for (int64_t s = 0; s < books.stages; s++) sum += peak[books.book[g * books.codes() + s * books.groups + p] * half + j];
        reach[j] = std::max(reach[j], sum);
      }
  made.step.resize(dim);
  for (int64_t j = 0; j < half; j++)
    made.step[j] = made.step[j + half] = static_cast<float>(reach[j] > 0 ? reach[j] / (kRange - 2 * books.stages) : 1.0);
  made.values.resize(books.rows.size());
  for (size_t i = 0; i < books.rows.size(); i++)
    made.values[i] = static_cast<int16_t>(std::lrint(books.rows[i] / made.step[i % dim]));
  made.longest = longest_vectors(books, longest_codewords(books, made.values));
  return made;
}

Books::Pairs make_pairs(const Books& books) {
  const int64_t dim = books.dim, padded = books.padded_size();
  Books::Pairs made;
  made.pairs = (dim + 1) / 2;
  made.values.assign(books.count * made.pairs * padded * 2, 0);
  double longest = 0;
  for (int64_t m = 0; m < books.count; m++) {
    const float* table = books.table(m);
    float largest = 0;
    for (int64_t i = 0; i < books.size * dim; i++) largest = std::max(largest, std::fabs(table[i]));
    const float step = largest > 0 ? largest / 32767 : 1.0f;
    made.step.push_back(step);
    for (int64_t c = 0; c < books.size; c++) {
      double square = 0;
      for (int64_t j = 0; j < dim; j++) {
        const auto x = static_cast<int16_t>(std::lrint(table[c * dim + j] / step));
        made.values[((m * made.pairs + j / 2) * padded + c) * 2 + j % 2] = x;
        square += static_cast<double>(x) * x;
      }
      longest = std::max(longest, square);
    }
  }
  made.longest = static_cast<float>(std::sqrt(longest));
  return made;
}

Books::Tiles make_tiles(const Books& books) {
  const int64_t dim = books.dim, padded = books.padded_size();
  Books::Tiles made;
  made.parts = (dim + 31) / 32;
  made.halves.assign(books.count * padded * made.parts * 32, 0);
  made.half_norms.assign(books.count * padded, std::numeric_limits<float>::infinity());
  made.names.assign(books.count * padded + 1, 0);
  made.slope.assign(books.count * padded / 4, 0.0f);
  // The sum of the half norms and the product is off by `unit` times |r|^2 / 2 + |r| |C| + |C|^2 / 2. If |C| > 4 |r|, the latter two are
  // less than 3 E, else than 3 |r| |C|.
  const double unit = static_cast<double>(made.parts * 32 + 16) * 6e-8;
  made.rounding = static_cast<float>(3 * unit);
  std::vector<double> slope(books.size);
  std::vector<int64_t> order(books.size);
  for (int64_t m = 0; m < books.count; m++) {
    for (int64_t c = 0; c < books.size; c++) {
      double lost = 0, square = 0;
      for (int64_t j = 0; j < dim; j++) {
        const float x = books.table(m)[c * dim + j];
        const double change = x + from_bfloat16(to_bfloat16(-x));
        lost += change * change;
        square += static_cast<double>(x) * x;
      }
      slope[c] = std::sqrt(lost) + std::sqrt(square) * (1.003 / 512 + 3 * unit);  // a vector's entries change by 2^-9 at most
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return slope[a] < slope[b]; });
    for (int64_t rank = 0, start = 0; rank < books.size; rank++) {
      const int64_t set = rank * (padded / 4) / books.size, c = order[rank];
      if (set != (rank - 1) * (padded / 4) / books.size) start = rank;
      const int64_t place = m * padded + set / 16 * 64 + (rank - start) * 16 + set % 16;
      uint16_t* tile = made.halves.data() + place / 16 * made.parts * 512;
      for (int64_t j = 0; j < dim; j++)
        tile[j / 32 * 512 + j % 32 / 2 * 32 + place % 16 * 2 + j % 2] = to_bfloat16(-books.table(m)[c * dim + j]);
      made.half_norms[place] = books.half_norms[m * padded + c];
      made.names[place] = static_cast<uint16_t>(c);
      made.slope[m * padded / 4 + set] = static_cast<float>(slope[c] * 1.000001);  // they ascend
    }
  }
  return made;
}

Books::Splits make_splits(const Books& books) {
  Books::Splits made;
  const bool exact = std::all_of(books.rows.begin(), books.rows.end(), [](float x) { return from_bfloat16(to_bfloat16(x)) == x; });
  made.parts = books.dim / 16, made.bunches = books.padded_size() / 32, made.terms = exact ? 1 : 2;
  made.halves.assign(books.count * made.bunches * made.parts * made.terms * 512, 0);
  for (int64_t m = 0; m < books.count; m++)
    for (int64_t c = 0; c < books.size; c++)
      for (int64_t j = 0; j < books.dim; j++) {
        float left = books.table(m)[c * books.dim + j];
        for (int64_t term = 0; term < made.terms; term++) {
          const uint16_t half = to_bfloat16(left);
          made.halves[made.of(m, c / 32, j / 16, term) - made.halves.data() + j % 16 * 32 + c % 32] = half;
          left -= from_bfloat16(half);
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
  for (int64_t m = 0; m < this->count; m++)
    for (int64_t c = 0; c < size; c++) {
      float square = 0;
      for (int64_t j = 0; j < dim; j++) {
        const float x = table(m)[c * dim + j];
        square += x * x;
      }
      half_norms[m * padded + c] = square * 0.5f;
    }
  longest = longest_vectors(*this, longest_codewords(*this, rows));
}

const float* Books::columns(int64_t m) const {
  std::call_once(columns_made, [this] {
    columns_.assign(count * dim * padded_size(), 0.0f);
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < size; c++)
        for (int64_t j = 0; j < dim; j++) columns_[(i * dim + j) * padded_size() + c] = table(i)[c * dim + j];
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
