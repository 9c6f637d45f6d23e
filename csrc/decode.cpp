// Codes to vectors: the sum of one codeword a stage, in the order of the stages.
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

#include <algorithm>

namespace kvfold {

constexpr int64_t kTokens = 64;  // of a piece of work

void decode(const DecodeCall& call) {
  const Books& books = *call.books;
  const int64_t stages = books.stages, groups = books.groups, dim = books.dim;
  const int64_t pieces = (call.tokens + kTokens - 1) / kTokens;
  parallel_for(call.threads, call.batch * books.heads * pieces, [&](int64_t item) {
    const int64_t pair = item / pieces, first = item % pieces * kTokens;
    const int64_t last = std::min(first + kTokens, call.tokens);
    const int32_t* book = books.book.data() + pair % books.heads * books.codes();
    for (int64_t t = first; t < last; t++) {
      const int32_t* codes = call.codes + (pair * call.tokens + t) * books.codes();
      float* vector = call.vectors + (pair * call.tokens + t) * groups * dim;
      for (int64_t p = 0; p < groups; p++)
        for (int64_t s = 0; s < stages; s++) {
          const int32_t code = codes[s * groups + p];
          if (code < 0 || code >= books.size) throw CodeOutOfRange();
          const float* codeword = books.table(book[s * groups + p]) + code * dim;
          float* part = vector + p * dim;
          if (s == 0)
            for (int64_t j = 0; j < dim; j++) part[j] = codeword[j];
          else
            for (int64_t j = 0; j < dim; j++) part[j] += codeword[j];
        }
    }
  });
}

}  // namespace kvfold
