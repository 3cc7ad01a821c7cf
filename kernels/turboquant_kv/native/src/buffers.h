// Python buffers with their shape checked: the border between arrays of unknown origin and bare pointers.
#pragma once
#include <nanobind/nanobind.h>

#include <initializer_list>
#include <string>

#include "jobs.h"

namespace tq {

// A held view of any object with the buffer protocol (NumPy and MLX arrays have it).
class View {
  public:
    static View of_any_rank(nanobind::handle object, const char* name) { return View(object, name, -1); }
    View(nanobind::handle object, const char* name, int ndim, bool writable = false) : name_(name) { // ndim -1: any
        const int flags = PyBUF_STRIDED_RO | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) {
            PyErr_Clear();
            fail(writable ? "is not a writable array" : "is not an array");
        }
        if (ndim >= 0 && buffer_.ndim != ndim) {
            PyBuffer_Release(&buffer_);
            fail("has the wrong number of axes");
        }
    }
    View(View&& other) noexcept : name_(other.name_), buffer_(other.buffer_) { other.buffer_.obj = nullptr; }
    View(const View&) = delete;
    View& operator=(View&&) = delete;
    ~View() {
        if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
    }

    int ndim() const { return buffer_.ndim; }
    std::int64_t shape(int axis) const { return buffer_.shape[axis]; }
    void* data() const { return buffer_.buf; }
    bool is_empty() const {
        for (int i = 0; i < buffer_.ndim; i++)
            if (buffer_.shape[i] == 0) return true;
        return false;
    }

    // Stride of an axis in elements. Axes of one element may carry any stride: they count as 0.
    std::int64_t stride(int axis) const {
        if (buffer_.shape[axis] < 2) return 0;
        if (buffer_.strides[axis] % buffer_.itemsize) fail("has a stride that is no multiple of its element");
        return buffer_.strides[axis] / buffer_.itemsize;
    }

    void expect_shape(std::initializer_list<std::int64_t> dims) const { // -1: any
        int axis = 0;
        for (std::int64_t want : dims) {
            if (want >= 0 && buffer_.shape[axis] != want)
                fail("has " + std::to_string(buffer_.shape[axis]) + " along axis " + std::to_string(axis) + ", expected " + std::to_string(want));
            axis++;
        }
    }

    void expect_type(const char* codes, std::size_t item_bytes) const { // struct-module letters
        const char* f = buffer_.format ? buffer_.format : "B";
        if (*f == '<' || *f == '=' || *f == '@') f++;
        if (std::string(codes).find(*f) == std::string::npos || f[1] != 0 || std::size_t(buffer_.itemsize) != item_bytes)
            fail(std::string("has elements of type '") + f + "', expected one of '" + codes + "'");
    }

    void expect_dense() const {
        std::int64_t step = 1;
        for (int axis = buffer_.ndim - 1; axis >= 0; axis--) {
            if (buffer_.shape[axis] > 1 && stride(axis) != step) fail("is not contiguous");
            step *= buffer_.shape[axis];
        }
    }

    void expect_dense_last_axis() const {
        const int last = buffer_.ndim - 1;
        if (buffer_.shape[last] > 1 && stride(last) != 1) fail("is not dense along its last axis");
    }

    Dtype dtype() const { // NumPy has no bfloat16: there uint16 stands for its bits
        const char* f = buffer_.format ? buffer_.format : "B";
        if (*f == '<' || *f == '=' || *f == '@') f++;
        const std::string type(f);
        if (type == "f" && buffer_.itemsize == 4) return Dtype::f32;
        if (type == "e" && buffer_.itemsize == 2) return Dtype::f16;
        if ((type == "H" || type == "bfloat16") && buffer_.itemsize == 2) return Dtype::bf16; // the latter is MLX's
        fail("has elements of type '" + type + "', expected float32, float16 or bfloat16");
    }

    [[noreturn]] void fail(const std::string& problem) const { throw std::invalid_argument(std::string(name_) + " " + problem); }

  private:
    const char* name_;
    Py_buffer buffer_{};
};

} // namespace tq
