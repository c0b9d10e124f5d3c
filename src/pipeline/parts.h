// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"

#include <string>
#include <vector>

namespace quern {

// The parts that a model is rounded in, each kept on disk as soon as it is done: the embedding, the
// blocks, the head. The experts of a mixture are parts of their own, some at a time, after the rest
// of their block: a layer of them can take an hour.
inline constexpr const char* kEmbeddingPart = "embedding";
inline constexpr const char* kHeadPart = "head";
inline constexpr int kExpertParts = 16;  // of a block, at most

// Experts [first, last) of a mixture.
struct ExpertRange {
  int first = 0;
  int last = 0;
};

[[nodiscard]] std::string block_part(const Block& block);
[[nodiscard]] std::string expert_part(const Block& block, const ExpertRange& experts);
[[nodiscard]] std::vector<ExpertRange> expert_parts(const Mixture& mixture);
// All parts of a block, in the order in which they are done.
[[nodiscard]] std::vector<std::string> block_parts(const Block& block);
[[nodiscard]] std::vector<std::string> all_parts(const ModelGraph& graph);

}  // namespace quern
