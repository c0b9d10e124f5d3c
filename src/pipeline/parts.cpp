// SPDX-License-Identifier: Apache-2.0
#include "pipeline/parts.h"

#include <fmt/format.h>

#include <algorithm>

namespace quern {

std::string block_part(const Block& block) {
  return fmt::format("{:04}", block.index);
}

std::string expert_part(const Block& block, const ExpertRange& experts) {
  return fmt::format("{}-experts-{:04}", block_part(block), experts.first);
}

std::vector<ExpertRange> expert_parts(const Mixture& mixture) {
  std::vector<ExpertRange> parts;
  const int each = (mixture.experts + kExpertParts - 1) / kExpertParts;
  for (int first = 0; first < mixture.experts; first += each) {
    parts.push_back({first, std::min(first + each, mixture.experts)});
  }
  return parts;
}

std::vector<std::string> block_parts(const Block& block) {
  std::vector<std::string> parts = {block_part(block)};
  if (block.mixture) {
    for (const ExpertRange& experts : expert_parts(*block.mixture)) {
      parts.push_back(expert_part(block, experts));
    }
  }
  return parts;
}

std::vector<std::string> all_parts(const ModelGraph& graph) {
  std::vector<std::string> parts = {kEmbeddingPart};
  for (const Block& block : graph.blocks) {
    for (std::string& part : block_parts(block)) {
      parts.push_back(std::move(part));
    }
  }
  parts.emplace_back(kHeadPart);
  return parts;
}

}  // namespace quern
