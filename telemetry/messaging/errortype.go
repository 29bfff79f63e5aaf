package messaging

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
)

// A Sentinel gives the error.type of errors that are Err.
type Sentinel struct {
	Err  error
	Type string
}

const (
	maxErrorTypes   = 32
	maxErrorTypeLen = 64
)

// errorTypes turns errors into values of error.type, of which there are few.
// Each gets a number, so that what is counted by it needs no map.
type errorTypes struct {
	sentinels []Sentinel

	mu    sync.RWMutex
	index map[string]int // never more than maxErrorTypes, and "_OTHER"
}

func newErrorTypes(sentinels []Sentinel) *errorTypes {
	all := append(append([]Sentinel(nil), sentinels...),
		Sentinel{context.DeadlineExceeded, "timeout"}, Sentinel{context.Canceled, "canceled"})
	return &errorTypes{sentinels: all, index: map[string]int{errorTypeOther: 0}}
}

// of returns the type of an error and its number. The error is the user's: its
// methods may panic.
func (t *errorTypes) of(err error) (name string, number int) {
	name = t.name(err)
	t.mu.RLock()
	number, ok := t.index[name]
	t.mu.RUnlock()
	if ok {
		return name, number
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if number, ok := t.index[name]; ok {
		return name, number
	}
	if len(t.index) > maxErrorTypes {
		return errorTypeOther, 0
	}
	number = len(t.index)
	t.index[name] = number
	return name, number
}

func (t *errorTypes) name(err error) (name string) {
	defer func() {
		if recover() != nil {
			name = errorTypeOther
		}
	}()
	// The most specific word first: what the error says of itself.
	if e, ok := errors.AsType[interface {
		error
		ErrorType() string
	}](err); ok {
		if s := clean(e.ErrorType(), maxErrorTypeLen); s != "" {
			return s
		}
	}
	for _, s := range t.sentinels {
		if errors.Is(err, s.Err) {
			return s.Type
		}
	}
	return clean(concreteType(err), maxErrorTypeLen)
}

// concreteType is the type of the first error in the tree that is not just a
// text or a mark around another one. A mark is what adds nothing to the text.
func concreteType(err error) string {
	for {
		name := reflect.TypeOf(err).String()
		var inner error
		switch w := err.(type) { //nolint:errorlint // it is the wrappers that are looked at
		case interface{ Unwrap() error }:
			inner = w.Unwrap()
		case interface{ Unwrap() []error }:
			if all := w.Unwrap(); len(all) > 0 {
				inner = all[0]
			}
		}
		text := strings.HasPrefix(name, "*fmt.wrap") || strings.HasPrefix(name, "*errors.join")
		if inner == nil || !text && inner.Error() != err.Error() {
			return name
		}
		err = inner
	}
}

// perError holds a value for each error type, made when first asked for.
type perError[T any] struct {
	made atomic.Pointer[[maxErrorTypes + 1]atomic.Pointer[T]] // most never fail
}

func (p *perError[T]) get(number int, create func() *T) *T {
	made := p.made.Load()
	if made == nil {
		p.made.CompareAndSwap(nil, new([maxErrorTypes + 1]atomic.Pointer[T]))
		made = p.made.Load()
	}
	if v := made[number].Load(); v != nil {
		return v
	}
	made[number].CompareAndSwap(nil, create())
	return made[number].Load()
}

// all are those that were made.
func (p *perError[T]) all(yield func(*T) bool) {
	made := p.made.Load()
	if made == nil {
		return
	}
	for i := range made {
		if v := made[i].Load(); v != nil && !yield(v) {
			return
		}
	}
}

// clean makes a text from outside fit for an attribute: exporters refuse a whole
// batch of spans for one that is not valid UTF-8.
func clean(s string, most int) string {
	if len(s) > most {
		s = s[:most]
	}
	return strings.ToValidUTF8(s, "")
}
