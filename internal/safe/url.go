package safe

import (
	"errors"
	"net/url"
	"strings"
)

var errURL = errors.New("malformed URL, want one such as scheme://host:port; special characters of a password are written as %XX")

// ParseURL is [url.Parse] with an error that has nothing of the text in it, which
// may have a password. A URL with an @ after its host is malformed, too: what
// stands before it is the end of a password, and what is taken for the host the
// beginning.
func ParseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || strings.Contains(u.Opaque+u.Path+u.RawQuery+u.Fragment, "@") {
		return nil, errURL
	}
	return u, nil
}
