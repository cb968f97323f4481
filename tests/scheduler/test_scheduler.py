"""Scheduler by example: budget, chunks, order, preemption, admission, prefix reuse, endings."""

from __future__ import annotations

import pytest

from llmserve.errors import ConfigError, InvalidRequestError
from llmserve.messages import FinishReason, SequenceOutput
from llmserve.scheduler.output import ResumedRequestData
from llmserve.scheduler.policy import PriorityPolicy
from tests.scheduler.driver import Driver
from tests.scheduler.fake_worker import engine_request, expected_answer


def prompt(num_tokens: int, start: int = 0) -> list[int]:
    return [start + index for index in range(num_tokens)]


class TestBudget:
    def test_a_short_prompt_is_computed_at_once_and_then_decodes(self) -> None:
        driver = Driver()
        driver.add(engine_request("a", prompt(10), max_tokens=3))
        assert driver.step()[0].num_scheduled_tokens == {"a": 10}
        assert driver.step()[0].num_scheduled_tokens == {"a": 1}
        driver.run()
        assert len(driver.answers["a"]) == 3

    def test_a_long_prompt_is_cut_into_chunks(self) -> None:
        driver = Driver(max_num_batched_tokens=8)
        driver.add(engine_request("a", prompt(19)))
        assert [driver.step()[0].num_scheduled_tokens["a"] for _ in range(4)] == [8, 8, 3, 1]

    def test_decodes_never_wait_for_a_prompt(self) -> None:
        driver = Driver(max_num_batched_tokens=8)
        driver.add(*(engine_request(name, prompt(2), max_tokens=50) for name in "abc"))
        driver.step()
        driver.add(engine_request("long", prompt(40)))
        for _ in range(8):
            scheduled = driver.step()[0].num_scheduled_tokens
            assert scheduled == {"a": 1, "b": 1, "c": 1, "long": 5}

    def test_a_prompt_first_in_order_leaves_the_decodes_behind_it_their_token(self) -> None:
        driver = Driver(max_num_batched_tokens=8, policy=PriorityPolicy())
        driver.add(*(engine_request(name, prompt(2), max_tokens=50, priority=5) for name in "abc"))
        driver.step()
        driver.add(engine_request("urgent", prompt(40), priority=0))
        driver.step()
        output, _ = driver.step()
        assert list(output.num_scheduled_tokens.items()) == [("urgent", 5), ("a", 1), ("b", 1), ("c", 1)]

    def test_what_one_prompt_leaves_goes_to_the_next(self) -> None:
        driver = Driver(max_num_batched_tokens=8)
        driver.add(engine_request("a", prompt(5)), engine_request("b", prompt(9, start=50)))
        assert driver.step()[0].num_scheduled_tokens == {"a": 5, "b": 3}
        assert driver.step()[0].num_scheduled_tokens == {"a": 1, "b": 6}

    def test_max_num_seqs_limits_who_runs(self) -> None:
        driver = Driver(max_num_seqs=2)
        driver.add(*(engine_request(name, prompt(2), max_tokens=2) for name in "abc"))
        assert list(driver.step()[0].num_scheduled_tokens) == ["a", "b"]
        stats = driver.scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (2, 1)
        driver.step()
        assert list(driver.step()[0].num_scheduled_tokens) == ["c"]
        driver.run()

    def test_several_sampled_tokens_are_computed_in_the_next_step(self) -> None:
        driver = Driver(num_sampled=lambda: 3)
        driver.add(engine_request("a", prompt(6), max_tokens=8))
        assert [driver.step()[0].num_scheduled_tokens["a"] for _ in range(3)] == [6, 3, 3]
        driver.run()
        assert len(driver.answers["a"]) == 8  # the ninth, sampled beyond the end, was dropped


class TestPreemption:
    def test_the_last_in_order_gives_way_and_comes_back_at_its_place(self) -> None:
        driver = Driver(num_blocks=6, block_size=4, watermark=0, enable_prefix_caching=False)
        for name, num_prompt_tokens in (("a", 8), ("b", 8), ("c", 5), ("d", 8)):
            driver.add(engine_request(name, prompt(num_prompt_tokens), max_tokens=8))
        events = []
        while driver.scheduler.has_work():
            output, _ = driver.step()
            events += [f"{new.request_id} starts" for new in output.new_requests]
            events += [f"{request_id} gives way" for request_id in output.preempted_ids]
            events += [f"{request_id} resumes" for request_id in output.resumed_requests]
        assert events == [
            *("a starts", "b starts", "c starts"),  # 2 blocks each: the pool is full
            "c gives way",  # to the third blocks of a and b
            "b gives way",  # to the fourth of a
            *("b resumes", "c resumes"),  # a is done; b and c go before d, which has waited all the time
            "d starts",
        ]

    def test_a_preempted_request_resumes_with_a_new_table_and_the_same_answer(self) -> None:
        driver = Driver(num_blocks=4, block_size=4, watermark=0, max_num_batched_tokens=64)
        driver.add(engine_request("a", prompt(7), max_tokens=9), engine_request("b", prompt(7, 50), max_tokens=9))
        driver.step()
        driver.step()
        output, _ = driver.step()  # both need a third block, and there is none
        assert output.preempted_ids == ["b"]
        assert list(output.num_scheduled_tokens) == ["a"]
        resumed: list[tuple[str, ResumedRequestData]] = []
        updates: list[SequenceOutput] = []
        while driver.scheduler.has_work():
            output, updates = driver.step()
            resumed += output.resumed_requests.items()
        [(request_id, data)] = resumed
        assert request_id == "b"
        assert data.num_computed_tokens % 4 == 0
        assert [update.num_preemptions for update in updates] == [1]
        assert driver.answers["b"] == expected_answer(engine_request("b", prompt(7, 50), max_tokens=9), 16)

    def test_no_victim_has_been_scheduled_in_the_step(self) -> None:
        """Three requests, blocks for two: the first two in order go on, whatever the order of arrival."""
        driver = Driver(num_blocks=6, block_size=2, watermark=0, policy=PriorityPolicy(), enable_prefix_caching=False)
        for name, priority in (("low", 2), ("high", 0), ("middle", 1)):
            driver.add(engine_request(name, prompt(4), max_tokens=4, priority=priority))
        assert list(driver.step()[0].num_scheduled_tokens) == ["high", "middle", "low"]
        output, _ = driver.step()
        assert list(output.num_scheduled_tokens) == ["high", "middle"]
        assert output.preempted_ids == ["low"]
        driver.run()

    def test_a_lone_request_that_fills_the_pool_ends_with_length(self) -> None:
        driver = Driver(num_blocks=3, block_size=4)
        driver.add(engine_request("a", prompt(5), max_tokens=1000), engine_request("b", prompt(5, 50), max_tokens=1000))
        driver.run()
        assert driver.finish_reasons == {"a": FinishReason.LENGTH, "b": FinishReason.LENGTH}
        assert len(driver.answers["a"]) == len(driver.answers["b"]) == 7


class TestAdmission:
    def test_a_watermark_of_blocks_stays_free_for_those_that_run(self) -> None:
        driver = Driver(num_blocks=10, block_size=4, watermark=0.3)
        driver.add(engine_request("a", prompt(16)), engine_request("b", prompt(16, 50)))
        assert list(driver.step()[0].num_scheduled_tokens) == ["a"]
        driver.add(engine_request("c", prompt(4, 90)))
        assert list(driver.step()[0].num_scheduled_tokens) == ["a"]  # c would fit, but is not let past b
        driver.run()

    def test_the_watermark_does_not_keep_out_a_request_that_is_alone(self) -> None:
        driver = Driver(num_blocks=10, block_size=4, watermark=0.5)
        driver.add(engine_request("a", prompt(39)))
        assert driver.step()[0].num_scheduled_tokens == {"a": 32}

    def test_a_prompt_is_let_in_only_if_all_of_it_fits(self) -> None:
        driver = Driver(num_blocks=10, block_size=4, watermark=0, max_num_batched_tokens=8)
        driver.add(engine_request("a", prompt(16), max_tokens=2), engine_request("b", prompt(30, 50)))
        for _ in range(3):
            assert list(driver.step()[0].num_scheduled_tokens) == ["a"]
        assert list(driver.step()[0].num_scheduled_tokens) == ["b"]

    def test_requests_that_cannot_ever_run_are_refused(self) -> None:
        driver = Driver(num_blocks=4, block_size=4, max_model_len=10)
        roomy = Driver(num_blocks=4, block_size=4)
        with pytest.raises(InvalidRequestError, match="16 tokens, but the KV cache holds 16") as refused:
            roomy.scheduler.add(engine_request("a", prompt(16)))
        assert refused.value.param == "prompt"
        with pytest.raises(InvalidRequestError, match="context is 10 tokens"):
            driver.scheduler.add(engine_request("a", prompt(10)))
        with pytest.raises(InvalidRequestError, match="empty"):
            driver.scheduler.add(engine_request("a", []))
        assert not driver.scheduler.has_work()
        driver.add(engine_request("a", prompt(9)))
        with pytest.raises(InvalidRequestError, match="in use"):
            driver.scheduler.add(engine_request("a", prompt(3)))
        driver.run()
        assert len(driver.answers["a"]) == 1
        roomy.add(engine_request("a", prompt(15)))
        roomy.run()

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("max_num_seqs", 0), ("max_num_seqs", 33), ("watermark", 1.0)],
    )
    def test_unusable_settings_are_refused_by_name(self, setting: str, value: float) -> None:
        with pytest.raises(ConfigError, match=setting):
            Driver(**{setting: value})  # type: ignore[arg-type]


class TestPrefixReuse:
    def test_equal_prompts_that_arrive_together_are_computed_once(self) -> None:
        driver = Driver(block_size=4)
        driver.add(*(engine_request(name, prompt(10)) for name in "abc"))
        output, updates = driver.step()
        assert output.num_scheduled_tokens == {"a": 10, "b": 2, "c": 2}
        tables = [new.block_ids for new in output.new_requests]
        assert tables[0][:2] == tables[1][:2] == tables[2][:2]
        assert len({table[2] for table in tables}) == 3
        assert [update.num_cached_tokens for update in updates] == [0, 8, 8]
        stats = driver.scheduler.stats()
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (30, 16)
        assert stats.num_prompt_tokens == 14
        driver.run()

    def test_a_full_hit_leaves_the_last_block_to_compute(self) -> None:
        driver = Driver(block_size=4)
        driver.add(engine_request("a", prompt(8)))
        driver.run()
        driver.add(engine_request("b", prompt(8)))
        assert driver.step()[0].num_scheduled_tokens == {"b": 4}
        driver.run()

    def test_the_next_turn_of_a_chat_finds_the_answer_too(self) -> None:
        driver = Driver(block_size=4)
        first_turn = prompt(6)
        driver.add(engine_request("a", first_turn, max_tokens=11))
        driver.run()
        second_turn = [*first_turn, *driver.answers["a"], 90, 91]
        driver.add(engine_request("b", second_turn))
        _, [update] = driver.step()
        assert update.num_cached_tokens == 16  # of 17: the last sampled token was never computed

    def test_salts_do_not_share(self) -> None:
        driver = Driver(block_size=4)
        driver.add(engine_request("a", prompt(10), cache_salt="x"), engine_request("b", prompt(10), cache_salt="y"))
        assert driver.step()[0].num_scheduled_tokens == {"a": 10, "b": 10}
        driver.run()

    def test_prompt_logprobs_need_the_whole_prompt_but_leave_it_to_others(self) -> None:
        driver = Driver(block_size=4)
        driver.add(engine_request("a", prompt(10)))
        driver.run()
        driver.add(engine_request("b", prompt(14), prompt_logprobs=1))
        assert driver.step()[0].num_scheduled_tokens == {"b": 14}
        assert driver.scheduler.stats().prefix_cache_queries == 0
        driver.add(engine_request("c", prompt(14)))
        assert driver.step()[0].num_scheduled_tokens == {"b": 1, "c": 2}
        driver.run()

    def test_without_prefix_caching_everything_is_computed(self) -> None:
        driver = Driver(enable_prefix_caching=False)
        driver.add(*(engine_request(name, prompt(10)) for name in "ab"))
        assert driver.step()[0].num_scheduled_tokens == {"a": 10, "b": 10}
        driver.run()


class TestEndings:
    def test_a_stop_token_ends_a_request_at_once(self) -> None:
        answer = expected_answer(engine_request("a", prompt(5), max_tokens=9), 1000)
        driver = Driver()
        driver.add(engine_request("a", prompt(5), max_tokens=9, stop_token_ids=[answer[0]]))
        _, [update] = driver.step()
        assert update.finish_reason is FinishReason.STOP
        assert update.stop_token_id == answer[0]
        assert not driver.scheduler.has_work()
        assert driver.scheduler.stats().num_free_blocks == driver.kv_cache.num_blocks

    def test_the_first_token_brings_the_news_of_the_start_once(self) -> None:
        driver = Driver(max_num_batched_tokens=8)
        driver.add(engine_request("a", prompt(9)))
        assert driver.step()[1] == []
        _, [update] = driver.step()
        assert update.first_scheduled_s == 1.0
        _, [update] = driver.step()
        assert update.first_scheduled_s == 0.0

    def test_abort_frees_blocks_at_once_and_tells_the_worker(self) -> None:
        driver = Driver(max_num_seqs=1)
        driver.add(engine_request("a", prompt(5)), engine_request("b", prompt(5)))
        driver.step()
        assert driver.abort(["b", "unknown", "a", "a"]) == ["b", "a"]
        assert driver.kv_cache.num_free_blocks == driver.kv_cache.num_blocks
        assert not driver.scheduler.has_work()
        output, _ = driver.step()
        assert output.finished_ids == ["a"]  # b never ran: the worker does not know it

    def test_tokens_of_an_aborted_request_are_passed_over(self) -> None:
        driver = Driver()
        driver.add(engine_request("a", prompt(5)), engine_request("b", prompt(5)))
        output = driver.scheduler.schedule(1.0)
        sampled = driver.worker.execute(output)
        driver.abort(["a"])
        assert [update.request_id for update in driver.scheduler.update(output, sampled)] == ["b"]

    def test_an_id_may_be_used_again(self) -> None:
        driver = Driver()
        driver.add(engine_request("a", prompt(5)))
        driver.step()
        driver.abort(["a"])
        driver.add(engine_request("a", prompt(7)))
        output, _ = driver.step()
        assert output.finished_ids == ["a"]
        assert [new.request_id for new in output.new_requests] == ["a"]
        driver.run()
