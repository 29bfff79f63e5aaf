package main

import (
	"context"
	"net"
	"sync"
)

// A link is a TCP proxy that can be cut and stalled.
type link struct {
	listener net.Listener
	target   string
	done     sync.WaitGroup

	mu     sync.Mutex
	state  linkState
	opened chan struct{} // closed when nothing is stalled
	conns  map[net.Conn]struct{}
	closed bool
}

type linkState int

const (
	linkOpen    linkState = iota
	linkCut               // connections are closed, and new ones at once
	linkStalled           // connections stay, and no byte passes
)

func newLink(ctx context.Context, target string) (*link, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k := &link{listener: l, target: target, opened: make(chan struct{}), conns: make(map[net.Conn]struct{})}
	close(k.opened)
	k.done.Go(k.accept)
	return k, nil
}

func (k *link) addr() string { return k.listener.Addr().String() }

func (k *link) set(state linkState) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || k.state == state {
		return
	}
	if k.state == linkStalled {
		close(k.opened)
	}
	k.state = state
	switch state {
	case linkStalled:
		k.opened = make(chan struct{})
	case linkCut:
		k.closeAll()
	case linkOpen:
	}
}

// closeAll is called with k.mu held.
func (k *link) closeAll() {
	for c := range k.conns {
		_ = c.Close() // it is to be gone
	}
	clear(k.conns)
}

func (k *link) close() {
	k.set(linkOpen)
	k.mu.Lock()
	k.closed = true
	k.closeAll()
	k.mu.Unlock()
	_ = k.listener.Close() // nobody needs it
	k.done.Wait()
}

// add reports whether a connection may go on.
func (k *link) add(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || k.state == linkCut {
		_ = c.Close() // that is the fault
		return false
	}
	k.conns[c] = struct{}{}
	return true
}

func (k *link) remove(c net.Conn) {
	k.mu.Lock()
	delete(k.conns, c)
	k.mu.Unlock()
	_ = c.Close() // the other side is gone
}

// pass waits while the link is stalled.
func (k *link) pass() {
	k.mu.Lock()
	opened := k.opened
	k.mu.Unlock()
	<-opened
}

func (k *link) accept() {
	for {
		c, err := k.listener.Accept()
		if err != nil {
			return
		}
		if k.add(c) {
			k.done.Go(func() { k.serve(c) })
		}
	}
}

func (k *link) serve(c net.Conn) {
	defer k.remove(c)
	k.pass()
	s, err := net.Dial("tcp", k.target) //nolint:noctx // to this machine
	if err != nil || !k.add(s) {
		return
	}
	k.done.Go(func() {
		k.copy(s, c)
		k.remove(s)
		k.remove(c)
	})
	k.copy(c, s)
	k.remove(s)
}

func (k *link) copy(to, from net.Conn) {
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		if n > 0 {
			k.pass()
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			k.pass()
			return
		}
	}
}
