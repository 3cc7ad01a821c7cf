// Operations of a simdgroup or threadgroup: reductions, scans, shuffles, votes, barriers, atomics, threadgroup memory.
// Owns what each lane computes from what all lanes brought; the runtime (fibres.cpp) makes them meet.
#pragma once
#include "math.h"

namespace metal {

enum class mem_flags : int { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((int)a | (int)b); }
inline void threadgroup_barrier(mem_flags flags, EMU_SITE) { emu_barrier(1, (int)flags, site); }
inline void simdgroup_barrier(mem_flags flags, EMU_SITE) { emu_barrier(0, (int)flags, site); }

// A lane's own value and those of its neighbours, as typed copies.
template <class T> struct gathered {
    T lane[32];
    uint32_t active, me;
    EMU_HIDDEN gathered(int op, T mine, const void* site) {
        static_assert(sizeof(T) <= 64, "too wide for a simd operation");
        emu_exchanged all = emu_exchange(op, &mine, sizeof(T), site);
        for (int i = 0; i < 32; ++i) __builtin_memcpy((void*)&lane[i], all.slot[i], sizeof(T));
        active = all.active, me = all.lane;
    }
    EMU_HIDDEN T from(uint32_t other, const void* site) const {
        if (other >= 32 || !(active >> other & 1)) emu_fail("inactive-lane", "a shuffle reads from a lane that does not exist", site);
        return lane[other];
    }
    // Halves the lanes again and again, as the hardware's tree does; lanes that do not exist take no part.
    template <class F> EMU_HIDDEN T reduce(F f) const {
        T value[32];
        uint32_t live = active;
        for (int i = 0; i < 32; ++i) value[i] = lane[i];
        for (int step = 16; step; step /= 2)
            for (int i = 0; i < step; ++i) {
                bool here = live >> i & 1, there = live >> (i + step) & 1;
                if (here && there) value[i] = f(value[i], value[i + step]);
                else if (there) value[i] = value[i + step], live |= 1u << i;
            }
        return value[0];
    }
    template <class F> EMU_HIDDEN T scan(F f, T start, bool inclusive) const {
        for (uint32_t i = 0; i < me + (inclusive ? 1 : 0); ++i) start = f(start, lane[i]);
        return start;
    }
};

#define EMU_REDUCE(name, op, expression)                                                                       \
    template <class T> EMU_HIDDEN inline T name(T x, EMU_SITE) {                                               \
        return gathered<T>(op, x, site).reduce([](T a, T b) { return T(expression); });                        \
    }
EMU_REDUCE(simd_sum, EMU_SUM, a + b) EMU_REDUCE(simd_product, EMU_PRODUCT, a * b) EMU_REDUCE(simd_max, EMU_MAX, max(a, b))
EMU_REDUCE(simd_min, EMU_MIN, min(a, b)) EMU_REDUCE(simd_and, EMU_AND, a & b) EMU_REDUCE(simd_or, EMU_OR, a | b)
EMU_REDUCE(simd_xor, EMU_XOR, a ^ b)

#define EMU_SCAN_OP(name, expression, start, inclusive)                                                        \
    template <class T> EMU_HIDDEN inline T name(T x, EMU_SITE) {                                               \
        return gathered<T>(EMU_SCAN, x, site).scan([](T a, T b) { return T(expression); }, T(start), inclusive); \
    }
EMU_SCAN_OP(simd_prefix_inclusive_sum, a + b, 0, true) EMU_SCAN_OP(simd_prefix_exclusive_sum, a + b, 0, false)
EMU_SCAN_OP(simd_prefix_inclusive_product, a * b, 1, true) EMU_SCAN_OP(simd_prefix_exclusive_product, a * b, 1, false)

template <class T> EMU_HIDDEN inline T simd_shuffle(T x, ushort lane, EMU_SITE) {
    return gathered<T>(EMU_SHUFFLE, x, site).from(lane, site);
}
template <class T> EMU_HIDDEN inline T simd_broadcast(T x, ushort lane, EMU_SITE) {
    return gathered<T>(EMU_BROADCAST, x, site).from(lane, site);
}
template <class T> EMU_HIDDEN inline T simd_broadcast_first(T x, EMU_SITE) {
    return gathered<T>(EMU_BROADCAST_FIRST, x, site).lane[0];
}
template <class T> EMU_HIDDEN inline T simd_shuffle_xor(T x, ushort mask, EMU_SITE) {
    gathered<T> all(EMU_SHUFFLE_XOR, x, site);
    return all.from(all.me ^ mask, site);
}
// Lanes without a neighbour that far keep their own value, as on Apple's hardware.
template <class T> EMU_HIDDEN inline T simd_shuffle_up(T x, ushort by, EMU_SITE) {
    gathered<T> all(EMU_SHUFFLE_UP, x, site);
    return all.me < by ? x : all.lane[all.me - by];
}
template <class T> EMU_HIDDEN inline T simd_shuffle_down(T x, ushort by, EMU_SITE) {
    gathered<T> all(EMU_SHUFFLE_DOWN, x, site);
    uint from = all.me + by;
    return from > 31 || !(all.active >> from & 1) ? x : all.lane[from];
}
template <class T> EMU_HIDDEN inline T simd_shuffle_rotate_up(T x, ushort by, EMU_SITE) {
    gathered<T> all(EMU_SHUFFLE_ROTATE, x, site);
    return all.from((all.me + 32 - by % 32) % 32, site);
}
template <class T> EMU_HIDDEN inline T simd_shuffle_rotate_down(T x, ushort by, EMU_SITE) {
    gathered<T> all(EMU_SHUFFLE_ROTATE, x, site);
    return all.from((all.me + by) % 32, site);
}
template <class T> EMU_HIDDEN inline T quad_shuffle_xor(T x, ushort mask, EMU_SITE) {
    gathered<T> all(EMU_QUAD, x, site);
    return all.from(all.me ^ (mask & 3), site);
}
template <class T> EMU_HIDDEN inline T quad_sum(T x, EMU_SITE) {
    gathered<T> all(EMU_QUAD, x, site);
    uint first = all.me & ~3u;
    return T(T(all.lane[first] + all.lane[first + 2]) + T(all.lane[first + 1] + all.lane[first + 3]));
}

struct simd_vote {
    uint64_t bits;
    explicit operator uint64_t() const { return bits; }
    bool any() const { return bits != 0; }
};
EMU_HIDDEN inline uint32_t emu_votes(int op, bool x, const void* site) {
    gathered<bool> every(op, x, site);
    uint32_t set = 0;
    for (int i = 0; i < 32; ++i) set |= (every.active >> i & 1 && every.lane[i]) ? 1u << i : 0;
    return set;
}
EMU_HIDDEN inline uint32_t emu_active() {
    const emu_place* here = emu_where();
    uint32_t total = here->group_threads[0] * here->group_threads[1] * here->group_threads[2], first = here->simdgroup * 32;
    return total - first >= 32 ? ~0u : (1u << (total - first)) - 1;
}
inline simd_vote simd_ballot(bool x, EMU_SITE) { return {emu_votes(EMU_BALLOT, x, site)}; }
inline bool simd_any(bool x, EMU_SITE) { return emu_votes(EMU_ANY, x, site) != 0; }
inline bool simd_all(bool x, EMU_SITE) { return emu_votes(EMU_ALL, x, site) == emu_active(); }
EMU_HIDDEN inline bool simd_is_first() { return emu_where()->lane == 0; }
inline simd_vote simd_active_threads_mask(EMU_SITE) { return {emu_votes(EMU_ACTIVE, true, site)}; }

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

#define EMU_ATOMIC(name, expression)                                                                           \
    template <class T> EMU_HIDDEN inline T atomic_fetch_##name##_explicit(atomic<T>* at, std::type_identity_t<T> b, memory_order) { \
        emu_atomic(at, sizeof(T), 1);                                                                          \
        T a = at->value;                                                                                       \
        at->value = T(expression);                                                                             \
        return a;                                                                                              \
    }
EMU_ATOMIC(add, a + b) EMU_ATOMIC(sub, a - b) EMU_ATOMIC(max, max(a, T(b))) EMU_ATOMIC(min, min(a, T(b)))
EMU_ATOMIC(and, a & b) EMU_ATOMIC(or, a | b) EMU_ATOMIC(xor, a ^ b)
template <class T> EMU_HIDDEN inline T atomic_load_explicit(const atomic<T>* at, memory_order) {
    emu_atomic(at, sizeof(T), 0);
    return at->value;
}
template <class T> EMU_HIDDEN inline void atomic_store_explicit(atomic<T>* at, std::type_identity_t<T> x, memory_order) {
    emu_atomic(at, sizeof(T), 2);
    at->value = x;
}
template <class T> EMU_HIDDEN inline T atomic_exchange_explicit(atomic<T>* at, std::type_identity_t<T> x, memory_order) {
    emu_atomic(at, sizeof(T), 1);
    T was = at->value;
    at->value = x;
    return was;
}
template <class T>
EMU_HIDDEN inline bool atomic_compare_exchange_weak_explicit(atomic<T>* at, T* expected, std::type_identity_t<T> wanted, memory_order, memory_order) {
    emu_atomic(at, sizeof(T), 1);
    if (at->value == *expected) return at->value = wanted, true;
    *expected = at->value;
    return false;
}

} // namespace metal

namespace emu {
template <class A> inline A* threadgroup_variable(uint32_t id, const char* name) {
    return (A*)emu_threadgroup_alloc(id, sizeof(A), alignof(A), name);
}
inline void note_local(uint32_t id, uint32_t num_bytes) { emu_note_local(id, num_bytes); }
} // namespace emu
