"""Image tokens for each image: rows, labels and images by hand."""

import pytest

from tests.loaders.rows import IMAGE, expand, make_batch, make_packed


class TestExpand:
    def test_each_image_gets_its_tokens_and_rows_are_padded_again(self):
        inputs = expand(make_batch([[1, -200, 7, 8], [1, 7, 8, 9, 10]], [0]))
        assert inputs.input_ids.tolist() == [[1, IMAGE, IMAGE, IMAGE, 7, 8], [1, 7, 8, 9, 10, 0]]
        assert inputs.labels.tolist() == [[-100] * 4 + [7, 8], [-100, 7, 8, 9, 10, -100]]
        assert inputs.attention_mask.tolist() == [[True] * 6, [True] * 5 + [False]]
        assert inputs.images.flatten(1)[:, 0].tolist() == [0]
        assert inputs.position_ids is None

    def test_padding_that_no_row_needs_any_more_is_dropped(self):
        inputs = expand(make_batch([[1, -200], [1, 7, 8, 9]], [0]))
        assert inputs.input_ids.shape == (2, 4)

    def test_images_that_no_token_asks_for_are_left_out(self):
        inputs = expand(make_batch([[1, -200, 7], [1, 7], [1, -200, 7, -200]], [0, 0, 1, 2, 2, 2]))
        assert inputs.images.flatten(1)[:, 0].tolist() == [0, 3, 4]
        assert inputs.image_samples.tolist() == [0, 2, 2]

    @pytest.mark.parametrize(
        ("max_length", "tokens", "images"),
        [
            (9, [1, IMAGE, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE, 8], 2),
            (8, [1, IMAGE, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE], 2),
            (7, [1, IMAGE, IMAGE, IMAGE, 7], 1),
            (5, [1, IMAGE, IMAGE, IMAGE, 7], 1),
            (3, [1], 0),
        ],
    )
    def test_a_long_row_is_cut_but_never_within_an_image(self, max_length, tokens, images):
        inputs = expand(make_batch([[1, -200, 7, -200, 8]], [0, 0]), max_length=max_length)
        assert inputs.input_ids.tolist() == [tokens]
        assert inputs.images.flatten(1)[:, 0].tolist() == list(range(images))

    def test_an_image_token_that_a_text_writes_is_no_image(self):
        inputs = expand(make_batch([[1, IMAGE, 8]]))
        assert inputs.input_ids.tolist() == [[1, 0, 8]]
        assert inputs.labels.tolist() == [[-100, -100, 8]]
        assert inputs.attention_mask.all()

    def test_image_tokens_in_labels_are_not_trained_on(self):
        batch = make_batch([[1, -200, 7]], [0])
        batch.labels[0, 1] = -200
        assert expand(batch).labels.tolist() == [[-100] * 4 + [7]]


class TestPacked:
    def test_positions_begin_anew_and_no_sample_foretells_the_next(self):
        inputs = expand(make_packed([[[1, -200, 7], [8, 9]], [[1, 7]]], [0]))
        assert inputs.input_ids.tolist() == [[1, IMAGE, IMAGE, IMAGE, 7, 8, 9], [1, 7, 0, 0, 0, 0, 0]]
        assert inputs.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1]
        assert inputs.position_ids[1, :3].tolist() == [0, 1, 0]
        assert inputs.segment_ids[0].tolist() == [1] * 5 + [2] * 2
        assert inputs.labels[0].tolist() == [-100] * 4 + [7, -100, 9]

    def test_each_sample_is_cut_and_has_its_own_images(self):
        rows = [[[1, -200, 7, -200, 8], [1, 7], [1, -200, 9]], [[1, -200, 7]]]
        inputs = expand(make_packed(rows, [0, 0, 2, 2, 3]), max_length=5)
        assert inputs.input_ids[0].tolist() == [1, IMAGE, IMAGE, IMAGE, 7, 1, 7, 1, IMAGE, IMAGE, IMAGE, 9]
        assert inputs.images.flatten(1)[:, 0].tolist() == [0, 2, 4]

    def test_a_filler_between_samples_has_no_tokens(self):
        batch = make_packed([[[1, -200, 7], [], [1, -200, 9]]], [0, 2])
        batch.valid[1] = False
        batch.segment_ids[batch.segment_ids == 3] = 2
        assert len(expand(batch).images) == 2
