"""Tables of a terminal and of a file, and sizes in bytes."""

from pipelines.text_tables import byte_size, print_table


class TestTables:
    def test_on_a_terminal_they_are_drawn(self, capsys, monkeypatch):
        rows = [("4x4x1", 1234), ("[bold]", 5)]
        print_table("buckets", ("bucket", "samples"), rows)
        plain = capsys.readouterr().out
        assert plain == "buckets\n  bucket  samples\n  4x4x1     1,234\n  [bold]        5\n\n"
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        print_table("buckets", ("bucket", "samples"), rows)
        drawn = capsys.readouterr().out
        assert "──" in drawn
        assert "[bold]" in drawn

    def test_sizes(self):
        sizes = (0, 999, 1000, 34_882, 999_499_999, 2.5e12)
        told = ["0 bytes", "999 bytes", "1 kB", "34.9 kB", "999 MB", "2.5 TB"]
        assert [byte_size(size) for size in sizes] == told
