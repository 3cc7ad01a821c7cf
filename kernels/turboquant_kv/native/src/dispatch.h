// Which instruction-set levels this build and this CPU have, and the small-integer tables made for one of them.
#pragma once
#include <string>
#include <vector>

#include "jobs.h"

namespace tq {

std::vector<const KernelTable*> available_levels(); // fastest first; the portable one is always there
const KernelTable* find_level(const std::string& name); // "" or "auto": the fastest; throws std::invalid_argument
IntTable make_table(const Side& side, const KernelTable& level);

} // namespace tq
