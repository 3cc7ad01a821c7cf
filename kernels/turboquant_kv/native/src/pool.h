// A few threads that share out numbered tasks. They spin briefly for the next call, then sleep: an idle pool burns no CPU.
#pragma once
#include <functional>

namespace tq {

constexpr int kMaxThreads = 256;

// Threads used from the next call on, the caller included.
void set_num_threads(int num_threads);
int num_threads();

// fn(task, worker) for every task in [0, num_tasks); worker < kMaxThreads, and no two running tasks share one. Returns
// when all are done. One call runs at a time; others wait. fn must not throw. A forked child starts threads of its own.
void run_tasks(int num_tasks, const std::function<void(int task, int worker)>& fn);

} // namespace tq
