"""What was seen beside the figures of a table of the evidence: a note below it, by the group's name."""

NOTES: dict[str, str] = {
    "recall": """
        Every model begins on a plateau, on which it answers one of the values at random: it does not know yet which
        token came before which. Spans that begin as a token or less, with hard ends, show it. With spans of up to 64
        tokens and soft ends, as on the k-step lookup, FocusA left the plateau on one seed of five. It is the short
        windows that learn this, and not the iteration: one pass does it too. Full attention whose queries and keys are
        normalised stayed on the plateau, on a seed that does not count. On longer texts rotary positions decide. One
        pass that has them in its global branch answered 100% at distances that it was trained at, 47% at 64 to 127,
        and 8% and 3% beyond, on a seed that does not count. Sharper attention changed nothing, nor did fillers that
        are no key; without the rotation of its second layer, once trained, it answered 48% and 18% there. So the
        global branch keeps the quarter of its pairs that turns fastest, each within the length of training; beside it
        stand all of them, none, and full attention without any in its last layer. Half of them answered 77% at 8 L and
        99.8% of 16 pairs, on a seed that does not count; and logits that grow with the number of keys changed nothing
        there, at 8 L or with 16 pairs. As in Zoology, most keys are asked soon: where full attention can lose, at
        distances that are longer than the training examples, it does, and the mean at 8 L shows a part of that.
    """,
    "max-retrieval": """
        The entropy is that of the query that is asked. The local branch's exponent of 1.25 was chosen for it, on two
        seeds that do not count: it is spread as widely among 256 items as among 16, and more is answered among 4,096
        than with one that starts at 0. The global branch's, 1, was chosen on the same seeds for what is answered among
        4,096: 68% without it on the first, 97 to 100% on both where it starts at 0.5, 1 or 1.5. The global branch's
        entropy is so little, 0.03 of log n or some 1.1 items, that single seeds keep a third of it or gain one: within
        10% is the mean alone, and its interval tells nothing; nor is it spread, though.
    """,
    "multi-query-needles": """
        The rates were chosen on two seeds, on which FocusA was solved, after 400 and 700 steps, and one pass was not.
        On the five that count FocusA was solved on three; on the other two the steps ended at 80 and 84%.
    """,
    "entity-spans": """
        A matter of whether the list is read within these steps at all: FocusA did on four seeds of five, and full
        attention on one.
    """,
    "source-spans": """
        Hardly trained models. With spans of up to 128 tokens and soft ends FocusA's F1 was 23 on a seed that does not
        count, on which it is 42 with these.
    """,
    "k-step-5": """
        Queries and keys that are not normalised lose half of the seeds: most chains of look-ups are made within 400
        steps then too, but where the *first* look-up attends to another pair, because the symbol for k disturbs the
        query for x, more steps mend that slowly; and a model that answers nearly everything may lose it again.
    """,
    "dyck": """
        More steps leave less to tell apart: after 1,500 on a seed that does not count FocusA answered 99.9%, full
        attention 99.0 and one pass 99.7.
    """,
    "k-step-8": """
        Three thousand steps are few for it: FocusA was solved after 1,100 on one seed, and after 2,700 on the seed for
        tuning; on three others the steps ended with more than 99% of all answers right.
    """,
    "k-step-3-ablations": """
        One part at a time is left out or changed. What it takes is as many attentions as there are look-ups and one,
        and that values are fed back; of the rest nearly every part alone can be done without on this task, and the
        seed's form, without all of them, is not solved. A local output that starts silent loses one seed. With a
        refiner that learns from the loss two seeds are not solved, and two late. Read-outs from query and global
        output took 400 steps in the mean and a mixture that starts on the first iterate 460, which five seeds do not
        tell from the 560 of the default.
    """,
    "k-step-5-ablations": """
        Here parts are needed that three look-ups do without: with the last output read out instead of a mixture, or
        additive feedback, four seeds of five stay without the last one or two look-ups, though there are attentions
        enough.
    """,
    "sparsity": """
        Hardly trained models: none answers better with thousands of bytes before than with 32. It is the limit of 128
        keys that saves: sliding windows alone read as few, and FocusA's difference from them is not clear. It reads
        and keeps little, and decodes a token more slowly all the same: many small operations, which do not depend on
        the length. Adaptive Span reads few keys as well, but its cache keeps all.
    """,
    "text-equal-flops": """
        One pass does better: on text the iteration costs steps and gives nothing back. In 361 steps each FocusA came
        to 2.354 bits and one pass to 2.335, on a seed that does not count. With spans that start at half of 64 tokens,
        with soft ends, FocusA came to 2.749 there in as many FLOPs.
        The global branch's exponent starts at 0.5, for its entropy. In 294 steps, as many as the FLOPs were of when
        cells of short spans were larger, entropy / log n at 4 times the length was 1.12 times that at the length
        without one, on two seeds that do not count, and with it 1.04 and 1.05; bits were 2.447 and 2.428 without, and
        2.440 and 2.435 with it. On the five seeds that count it cost 0.006. At 1 it was 0.96 times, at 2.448 bits on
        the first seed. A mixture that starts on the first iterate came to 2.428 in as many steps there, and two
        iterations besides to 2.422.
        Four times the training brings them closer together and leaves their order: 1.946 bits, one pass 1.911, full
        attention 1.994 after 1,600 steps, and 2.018, 2.070 and 4.034 at 4 times the length, on a seed that does not
        count.
    """,
    "text-patched-equal-flops": """
        Lost: the iteration costs a sixth of the steps, and at this rate each of them is worth more than what FocusA
        adds. A mixture that starts on the first iterate, and three times the learning rate for FocusA alone, did no
        better on a seed that does not count. One pass is level with full attention. At equal steps and the smaller
        rate FocusA gains, see the table before. The more a model has learned before, the less is left to gain: after
        1,600 steps of pretraining at 0.003 (1.994 bits), further training at 0.001 came to 1.956 bits with full
        attention, at equal FLOPs to 1.964 with FocusA, 1.958 with two iterations and 1.957 with one pass, and at equal
        steps to 1.954 with FocusA, on a seed that does not count. Neither feedback through the layer (1.964), nor 10
        times the learning rate for FocusA (1.970), nor a local output that starts at 0.1 at three times the rate
        (1.965) helped there.
    """,
    "text-patched": """
        On a seed that does not count, spans that begin as 1% of 256 tokens came to 2.421 bits, with edges of 8 tokens
        to 2.434; spans of at most 16 tokens to 2.422, and with those one pass to 2.431; full attention to 2.457. So
        spans begin short and end hard by default. Within these steps neither the refiner nor the predictor adds
        anything: spans stay about as they began, and that is as well: with 10 and 30 times its learning rate the
        predictor lengthens them, to 2.424 and 2.433 bits on that seed. Of spans that begin at half of 64 tokens a
        refiner with `span_cost=0.5` takes away a third of the keys read, 30 instead of 41, at the same 2.440 bits;
        with the default of 0.01 next to none. The row of the seed's reward was measured last, when cells of short
        spans were smaller: its FLOPs are not comparable with the others'.
    """,
}


def note_on(group: str) -> str:
    """The note of a group in one paragraph; empty where there is none."""
    return " ".join(NOTES.get(group, "").split())
