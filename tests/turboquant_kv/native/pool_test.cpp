// The thread pool under the thread sanitizer: nested callers, changing thread counts, many short calls.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "pool.h"

int main() {
    std::atomic<long> done{0};
    std::vector<std::thread> callers;
    tq::set_num_threads(4);
    for (int caller = 0; caller < 3; caller++)
        callers.emplace_back([&, caller] {
            for (int round = 0; round < 300; round++) {
                std::vector<int> seen(round % 17, 0); // not atomic: the pool must publish it
                tq::run_tasks(int(seen.size()), [&](int task, int worker) {
                    seen[task] += worker >= 0 ? 1 : 100;
                    done++;
                });
                for (int count : seen)
                    if (count != 1) std::abort();
                if (caller == 0 && round % 50 == 0) tq::set_num_threads(1 + round / 50);
            }
        });
    for (auto& caller : callers) caller.join();
    std::printf("%ld tasks\n", done.load());
    return 0;
}
