"""When batches form, who is in them, and what becomes of failures and of clients who leave."""

import asyncio
import threading

import pytest

from pipelines.serving.batcher import Batcher


class Work:
    """Doubles numbers and remembers its batches; the first one ends when `gate` is opened."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        if not held:
            self.gate.set()

    def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        assert self.gate.wait(10)
        if 13 in numbers:
            raise ValueError("thirteen")
        return [2 * number for number in numbers]

    async def started(self) -> None:
        while not self.batches:
            await asyncio.sleep(0.001)


def test_all_that_wait_go_when_the_device_is_free():
    work = Work(held=True)

    async def arrivals():
        batcher = Batcher(work, max_batch_size=16)
        tasks = [asyncio.create_task(batcher.submit(0))]
        await work.started()
        for number in range(1, 10):  # one after the other, each later than `wait_s`
            tasks.append(asyncio.create_task(batcher.submit(number)))
            await asyncio.sleep(0.002)
        work.gate.set()
        return await asyncio.gather(*tasks)

    results = asyncio.run(arrivals())
    assert work.batches == [[0], list(range(1, 10))]
    assert [done.result for done in results] == [2 * number for number in range(10)]
    assert [done.batch_size for done in results] == [1] + [9] * 9
    assert results[0].seconds >= 9 * 0.002


def test_batches_are_bounded_and_in_order_of_arrival():
    work = Work()

    async def burst():
        batcher = Batcher(work, max_batch_size=4)
        await asyncio.gather(*(batcher.submit(number) for number in range(10)))

    asyncio.run(burst())
    assert work.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(("wait_s", "batches"), [(0.0, [[1], [2]]), (0.5, [[1, 2]])])
def test_an_incomplete_batch_waits_wait_s(wait_s, batches):
    work = Work()

    async def two():
        batcher = Batcher(work, max_batch_size=2, wait_s=wait_s)
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batcher.submit(2))

    asyncio.run(two())
    assert work.batches == batches


def test_a_cancelled_request_is_never_worked_on_and_its_neighbours_are():
    work = Work(held=True)

    async def leave():
        batcher = Batcher(work, max_batch_size=1)
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await work.started()
        tasks[0].cancel()  # it is running: the work goes on, its answer goes nowhere
        tasks[1].cancel()
        work.gate.set()
        return (await tasks[2]).result

    assert asyncio.run(leave()) == 6
    assert work.batches == [[1], [3]]


def test_a_failure_reaches_the_whole_batch_and_nobody_else():
    work = Work()

    async def fail():
        batcher = Batcher(work, max_batch_size=2)
        return await asyncio.gather(
            *(batcher.submit(number) for number in (1, 13, 4, 5)), return_exceptions=True
        )

    results = asyncio.run(fail())
    assert [str(error) for error in results[:2]] == ["thirteen", "thirteen"]
    assert [done.result for done in results[2:]] == [8, 10]
