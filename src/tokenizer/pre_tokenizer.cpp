// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/pre_tokenizer.h"

#include "base/error.h"
#include "tokenizer/utf8.h"

namespace quern {

PreTokenizer::Run::Run(const PreTokenizer& owner) : owner_(&owner) {
  for (const Step& step : owner.steps_) {
    matchers_.emplace_back();
    if (step.regex) {
      matchers_.back().emplace(*step.regex);
    }
  }
}

void PreTokenizer::Run::split(std::string_view text, const Sink& sink) {
  step(0, text, sink);
}

void PreTokenizer::Run::step(std::size_t index, std::string_view piece, const Sink& sink) {
  if (piece.empty()) {
    return;
  }
  if (index == owner_->steps_.size()) {
    sink(piece);
  } else if (owner_->steps_[index].regex) {
    cut(index, piece, sink);
  } else if (piece.front() == ' ') {
    step(index + 1, piece, sink);
  } else {
    step(index + 1, prefixed_.emplace_back(" " + std::string(piece)), sink);
  }
}

void PreTokenizer::Run::cut(std::size_t index, std::string_view piece, const Sink& sink) {
  std::size_t done = 0;
  std::size_t begin = 0;
  std::size_t end = 0;
  for (std::size_t from = 0; from < piece.size();) {
    if (!matchers_[index]->find(piece, from, begin, end)) {
      break;
    }
    // A match may be empty; it still parts what is before it from what follows.
    step(index + 1, piece.substr(done, begin - done), sink);
    step(index + 1, piece.substr(begin, end - begin), sink);
    done = end;
    from = end > begin || end == piece.size() ? end : end + code_point_at(piece, end).length;
  }
  step(index + 1, piece.substr(done), sink);
}

}  // namespace quern
