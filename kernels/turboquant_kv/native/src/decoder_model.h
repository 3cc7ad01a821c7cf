// A model's decode step as one call: embedding, all decoder layers with their attention, last norm and head.
//
// Between two layers a step of one row is a few microseconds of Python against as many of arithmetic, and threads that wait so
// long go to sleep. What a step moves and sees is decided for all layers by Python (cache/step.py) and checked here before the
// first layer writes.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "decoder_block.h"
#include "native_store.h"

namespace tq {

class DecoderModel {
  public:
    DecoderModel(const DecoderModel&) = delete;
    // embedding and head: LinearWeights (N, W) each, which may be the same; blocks: DecoderBlock of one width; norm (W,).
    DecoderModel(nanobind::object embedding, std::vector<nanobind::object> blocks, nanobind::handle norm, float eps, nanobind::object head)
        : held_(std::move(blocks)), embedding_(nanobind::cast<const LinearWeights*>(embedding)), head_(nanobind::cast<const LinearWeights*>(head)) {
        if (held_.empty()) throw std::invalid_argument("a model has a decoder layer at least");
        for (const auto& block : held_) blocks_.push_back(nanobind::cast<const DecoderBlock*>(block));
        for (const DecoderBlock* block : blocks_)
            if (block->width() != embedding_->num_in() || &block->level() != &embedding_->level())
                throw std::invalid_argument("decoder layers and the embedding do not fit each other");
        if (head_->num_in() != embedding_->num_in() || &head_->level() != &embedding_->level())
            throw std::invalid_argument("the head does not fit the embedding");
        norm_ = Norm(norm, "norm", width(), eps);
        if (!norm_.is_there()) throw std::invalid_argument("a model has a last norm");
        held_.push_back(std::move(embedding));
        held_.push_back(std::move(head));
    }

    int width() const { return embedding_->num_in(); }

    // x (M, W) float32 to logits (M, N) float32: last norm and head.
    void logits(nanobind::handle x, nanobind::handle out) const {
        const View in = dense_floats(x, "x", {-1, width()}, false);
        const View to = dense_floats(out, "logits", {in.shape(0), head_->num_out()}, true);
        if (in.is_empty()) return;
        if (in.shape(0) > kMostWidth) in.fail("has too many rows");
        nanobind::gil_scoped_release release;
        head_product(static_cast<const float*>(in.data()), int(in.shape(0)), static_cast<float*>(to.data()));
    }

    // One new token of each of B sequences in all layers. tokens (B,) int64; figures (B, 9) and page_ids as Store.attend has them;
    // writes (2, n) int64: new rows that stay exact, and where they go; copies (2, m): rows that move first, or None; closed: ids,
    // numbers and starts of pages to encode then, or None. layers: of each (store, k, v, turn, scale, window, key factors, query
    // factors): its exact rows (H, rows, D) and (H, rows, Dv); turn (B, D) as DecoderBlock has it; factors (H, D) and (Hq, D) that
    // keys and queries are multiplied by, or None both. logits (B, N) float32. What raises has written nothing.
    void step(nanobind::handle tokens, nanobind::handle figures, nanobind::handle page_ids, nanobind::handle writes, nanobind::handle copies,
              nanobind::handle closed, nanobind::list layers, nanobind::handle logits) const {
        View ids(tokens, "tokens", 1);
        const std::int64_t batch = ids.shape(0);
        const std::int64_t* token = embedding_->expect_rows(ids);
        const View to = dense_floats(logits, "logits", {batch, head_->num_out()}, true);
        if (nanobind::len(layers) != blocks_.size()) throw std::invalid_argument("a step has other layers than the model");
        if (batch > kMostRows) ids.fail("are too many");
        const View pairs = moves_of(writes, "writes");
        std::optional<View> copied;
        if (!copies.is_none()) copied.emplace(moves_of(copies, "copies"));
        NativeStore::Moves moves{copied ? static_cast<const std::int64_t*>(copied->data()) : nullptr, static_cast<const std::int64_t*>(pairs.data()),
                                 copied ? copied->shape(1) : 0, pairs.shape(1), nanobind::none(), nanobind::none(), nanobind::none()};
        if (!closed.is_none()) moves.page_ids = closed[0], moves.numbers = closed[1], moves.starts = closed[2];
        std::vector<Layer> plan;
        plan.reserve(blocks_.size());
        for (std::size_t i = 0; i < blocks_.size(); i++) plan.push_back(planned(*blocks_[i], layers[i], figures, page_ids, moves, batch));
        if (batch == 0) return;
        nanobind::gil_scoped_release release;
        compute(token, int(batch), plan, moves, static_cast<float*>(to.data()));
    }

  private:
    static constexpr std::int64_t kMostRows = 1 << 16;

    struct Layer {
        NativeStore* store;
        std::unique_ptr<NativeStore::TokenStep> step;
        View turn;
        std::optional<View> of_keys, of_queries;
    };

    static View dense_floats(nanobind::handle object, const char* name, std::initializer_list<std::int64_t> shape, bool writable) {
        View view(object, name, int(shape.size()), writable);
        view.expect_type("f", 4);
        view.expect_shape(shape);
        view.expect_dense();
        return view;
    }

    static View moves_of(nanobind::handle object, const char* name) {
        View view(object, name, 2);
        view.expect_type("lq", 8);
        view.expect_shape({2, -1});
        view.expect_dense();
        return view;
    }

    static Layer planned(const DecoderBlock& block, nanobind::handle given, nanobind::handle figures, nanobind::handle page_ids,
                         const NativeStore::Moves& moves, std::int64_t batch) {
        if (nanobind::len(given) != 8) throw std::invalid_argument("a layer is eight things");
        auto* store = nanobind::cast<NativeStore*>(given[0]);
        if (store->heads() != block.num_kv_heads() || store->k_dim() != block.dim() || store->v_dim() != block.v_dim())
            throw std::invalid_argument("a store does not fit its layer");
        auto step = store->plan_token(given[1], given[2], figures, page_ids, moves, batch, block.num_heads(), nanobind::cast<float>(given[4]),
                                      nanobind::cast<std::int64_t>(given[5]));
        Layer layer{store, std::move(step), dense_floats(given[3], "turn", {batch, block.dim()}, false), {}, {}};
        if (!nanobind::object(given[6]).is_none()) {
            layer.of_keys.emplace(dense_floats(given[6], "key factors", {block.num_kv_heads(), block.dim()}, false));
            layer.of_queries.emplace(dense_floats(given[7], "query factors", {block.num_heads(), block.dim()}, false));
        }
        return layer;
    }

    static void multiply(float* x, int batch, const View& factors) {
        const auto* f = static_cast<const float*>(factors.data());
        const std::int64_t n = factors.shape(0) * factors.shape(1);
        for (int b = 0; b < batch; b++)
            for (std::int64_t i = 0; i < n; i++) x[b * n + i] *= f[i];
    }

    void compute(const std::int64_t* tokens, int batch, std::vector<Layer>& plan, const NativeStore::Moves& moves, float* logits) const {
        float* x = scratch_floats<5>(std::size_t(batch) * width());
        for (int b = 0; b < batch; b++) embedding_->row(int(tokens[b]), x + std::size_t(b) * width());
        for (std::size_t i = 0; i < plan.size(); i++) {
            const DecoderBlock& block = *blocks_[i];
            Layer& layer = plan[i];
            const std::size_t q = std::size_t(batch) * block.num_heads() * block.dim(), k = std::size_t(batch) * block.num_kv_heads() * block.dim();
            const std::size_t v = std::size_t(batch) * block.num_kv_heads() * block.v_dim(), out = std::size_t(batch) * block.num_heads() * block.v_dim();
            float* queries = scratch_floats<6>(q + k + v + out);
            float *keys = queries + q, *values = keys + k, *attended = values + v;
            float* to[3] = {queries, keys, values};
            block.project(x, batch, 1, static_cast<const float*>(layer.turn.data()), block.dim(), to);
            if (layer.of_keys) multiply(keys, batch, *layer.of_keys), multiply(queries, batch, *layer.of_queries);
            layer.store->append_and_attend(*layer.step, moves, queries, keys, values, attended);
            const std::int64_t strides[3] = {std::int64_t(block.num_heads()) * block.v_dim(), block.v_dim(), 0};
            block.finish(x, batch, 1, attended, strides, x);
        }
        head_product(x, batch, logits);
    }

    void head_product(const float* x, int num_rows, float* logits) const {
        thread_local FedRows fed;
        const KernelTable& level = head_->level();
        float* after = scratch_floats<7>(std::size_t(num_rows) * width());
        fed.set(after, num_rows, width(), 1);
        head_->expect_of(fed);
        fed.each_row(level.linear, [&](int m) { norm_.apply(level.blocks, x + std::size_t(m) * width(), after + std::size_t(m) * width()); });
        head_->products(fed, logits);
    }

    std::vector<nanobind::object> held_; // keeps what the pointers point to
    const LinearWeights *embedding_, *head_;
    std::vector<const DecoderBlock*> blocks_;
    Norm norm_;
};

} // namespace tq
