// Which instruction-set levels this build and this CPU have, and the small-integer tables made for one of them.
#pragma once
#include <string>
#include <vector>

#include "jobs.h"

namespace tq {

std::vector<const KernelTable*> available_levels(); // fastest first; none where the build was for another CPU alone
const KernelTable* find_level(const std::string& name); // "" or "auto": the fastest; throws std::invalid_argument
// Tables of a mean (heads, dim), averaged over blocks, that turns; stride and gap are proven to fit.
Turning make_turning(int heads, int dim, std::vector<double> mean, std::vector<double> frequencies, int stride, int gap);
void grow_spans(Turning& turning, int sink_tokens, std::int64_t num_blocks); // for conversations of that many blocks
// What keys are centred by in the block whose middle is at `position`: head h's at out + h * head_stride.
void block_means(const Turning& turning, int heads, int dim, double position, float* out, std::int64_t head_stride);
IntTable make_table(const Side& side, const KernelTable& level);

} // namespace tq
