const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const uint tid = thread_position_in_threadgroup.x;
const uint block_x = threadgroup_position_in_grid.x;
const uint block_y = threadgroup_position_in_grid.y;
const uint block_z = threadgroup_position_in_grid.z;
const uint num_blocks_x = threadgroups_per_grid.x;
