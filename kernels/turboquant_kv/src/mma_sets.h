// A batch's exact rows lie where each sequence has them: this sequence's arrays get the common names.
#if TQ_NUM_SETS == 2
#define TQ_OF_SET(name, of) (sequence == 0 ? name##_0##of : name##_1##of)
#elif TQ_NUM_SETS == 4
#define TQ_OF_SET(name, of) (sequence == 0 ? name##_0##of : sequence == 1 ? name##_1##of : sequence == 2 ? name##_2##of : name##_3##of)
#else
#define TQ_OF_SET(name, of)                                                                                  \
  (sequence < 4 ? (sequence == 0 ? name##_0##of : sequence == 1 ? name##_1##of : sequence == 2 ? name##_2##of : name##_3##of) \
                : (sequence == 4 ? name##_4##of : sequence == 5 ? name##_5##of : sequence == 6 ? name##_6##of : name##_7##of))
#endif
#define TQ_SET(name)                        \
  const Exact* name = TQ_OF_SET(name, );    \
  const Strides& name##_strides = TQ_OF_SET(name, _strides);
TQ_SET(sink_k)
TQ_SET(sink_v)
TQ_SET(window_k)
TQ_SET(window_v)
#undef TQ_SET
#undef TQ_OF_SET
