from __future__ import annotations

from presence.stomp import StompError


def test_an_error_keeps_what_it_was_made_of():
    error = StompError("SEND without destination", 1002, receipt="r1", headers={"version": "1.2"})
    assert (error.message, error.code, error.receipt) == ("SEND without destination", 1002, "r1")
    assert error.headers == {"version": "1.2"}
    assert str(error) == "SEND without destination"


def test_an_error_has_no_receipt_and_no_further_headers_unless_told():
    error = StompError("silence", 1002)
    assert error.receipt is None
    assert dict(error.headers) == {}


def test_the_message_is_one_line_whatever_it_quotes():
    """WIRE §6: "`message` (one line, names the field or destination)"."""
    assert StompError("destination /a\r\nx:y\0\x1bb", 1008).message == "destination /a x:y b"
