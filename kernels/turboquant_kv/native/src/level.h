// One instruction-set level: included by a translation unit of its own, compiled with that level's flags, inside a
// namespace of its own. Nothing inline may be shared between levels, or the linker could keep the wrong copy.
static const KernelTable kTable = {
    kName, kKeyLow, kKeyHigh, kValueLow, kValueHigh, LANES, decode_segment, merge_segments, decode_scratch, partial_floats,
    prefill, prefill_scratch, encode_page, decode_page, to_canonical, from_canonical, unrotate_rows,
    kLinear, kBlocks, kDraw,
};
