const uint tid = threadIdx.x;
const uint lane = tid & 31;
const uint warp = tid >> 5;
const uint block_x = blockIdx.x;
const uint block_y = blockIdx.y;
const uint block_z = blockIdx.z;
const uint num_blocks_x = gridDim.x;
