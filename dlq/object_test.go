package dlq_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// TestStore_Object has objects whole and broken. None of them takes a consumer.
func TestStore_Object(t *testing.T) {
	t.Parallel()

	// forge stores another description of object "x".
	forge := func(t *testing.T, b *bundle, bucket jetstream.ObjectStore, change func(*jetstream.ObjectInfo)) {
		t.Helper()
		info, err := bucket.GetInfo(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		change(info)
		data, err := json.Marshal(info)
		if err != nil {
			t.Fatal(err)
		}
		msg := &nats.Msg{Subject: "$O.DLQ_LARGE.M.eA==", Data: data, Header: nats.Header{jetstream.MsgRollup: {jetstream.MsgRollupSubject}}}
		if _, err := b.js.PublishMsg(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
	}
	chunk := func(t *testing.T, b *bundle, bucket jetstream.ObjectStore, number int) *jetstream.RawStreamMsg {
		t.Helper()
		info, err := bucket.GetInfo(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		stream, err := b.js.Stream(t.Context(), "OBJ_DLQ_LARGE")
		if err != nil {
			t.Fatal(err)
		}
		m, err := stream.GetMsg(t.Context(), uint64(number), jetstream.WithGetMsgSubject("$O.DLQ_LARGE.C."+info.NUID))
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	remove := func(t *testing.T, b *bundle, bucket jetstream.ObjectStore, number int) {
		t.Helper()
		m := chunk(t, b, bucket, number)
		stream, err := b.js.Stream(t.Context(), "OBJ_DLQ_LARGE")
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.DeleteMsg(t.Context(), m.Sequence); err != nil {
			t.Fatal(err)
		}
	}
	add := func(t *testing.T, b *bundle, bucket jetstream.ObjectStore, data []byte) {
		t.Helper()
		if _, err := b.js.Publish(t.Context(), chunk(t, b, bucket, 1).Subject, data); err != nil {
			t.Fatal(err)
		}
	}

	const chunkSize = 128 << 10
	tests := []struct {
		name string
		size int
		harm func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) // nil: none
		want error
	}{
		{name: "empty", size: 0},
		{name: "one byte", size: 1},
		{name: "a chunk", size: chunkSize},
		{name: "a byte more than a chunk", size: chunkSize + 1},
		{name: "a batch", size: 4 << 20},
		{name: "several batches", size: 9<<20 + 5},
		{
			name: "first chunk gone", size: 3 * chunkSize, want: dlq.ErrObjectBroken,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) { remove(t, b, bucket, 1) },
		},
		{
			name: "last chunk gone", size: 3 * chunkSize, want: dlq.ErrObjectBroken,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) { remove(t, b, bucket, 3) },
		},
		{
			name: "only chunk gone", size: 100, want: dlq.ErrObjectBroken,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) { remove(t, b, bucket, 1) },
		},
		{
			name: "a chunk more", size: 3 * chunkSize, want: dlq.ErrObjectBroken,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) { add(t, b, bucket, []byte("more")) },
		},
		{
			name: "larger than it says", size: 3*chunkSize + 10, want: dlq.ErrObjectBroken,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) {
				forge(t, b, bucket, func(i *jetstream.ObjectInfo) { i.Size = 3*chunkSize + 9 })
			},
		},
		{
			name: "far smaller than it says", size: 3 * chunkSize, want: dlq.ErrObject,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) {
				forge(t, b, bucket, func(i *jetstream.ObjectInfo) { i.Size = 1 << 60 })
			},
		},
		{
			name: "another chunk of the same size", size: 2 * chunkSize, want: jetstream.ErrDigestMismatch,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) {
				remove(t, b, bucket, 2)
				add(t, b, bucket, make([]byte, chunkSize))
			},
		},
		{
			name: "another digest", size: 10, want: dlq.ErrObjectBroken,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) {
				forge(t, b, bucket, func(i *jetstream.ObjectInfo) { i.Digest = "SHA-256=" })
			},
		},
		{
			name: "a link", size: 10, want: jetstream.ErrBadObjectMeta,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) {
				forge(t, b, bucket, func(i *jetstream.ObjectInfo) {
					i.Opts = &jetstream.ObjectMetaOptions{Link: &jetstream.ObjectLink{Bucket: "SECRETS", Name: "x"}}
				})
			},
		},
		{
			name: "no chunks named", size: 10, want: jetstream.ErrBadObjectMeta,
			harm: func(t *testing.T, b *bundle, bucket jetstream.ObjectStore) {
				forge(t, b, bucket, func(i *jetstream.ObjectInfo) { i.NUID = "" })
			},
		},
		{
			name: "deleted", size: 10, want: jetstream.ErrObjectNotFound,
			harm: func(t *testing.T, _ *bundle, bucket jetstream.ObjectStore) {
				if err := bucket.Delete(t.Context(), "x"); err != nil {
					t.Fatal(err)
				}
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, dlq.Config{})
			data := noise(1, tt.size)
			if err := s.PutObjects(t.Context(), map[string][]byte{"x": data, "other": noise(2, 300<<10)}); err != nil {
				t.Fatal(err)
			}
			bucket, err := b.js.ObjectStore(t.Context(), "DLQ_LARGE")
			if err != nil {
				t.Fatal(err)
			}
			if tt.harm != nil {
				tt.harm(t, b, bucket)
			}
			got, err := s.Object(t.Context(), "x")
			if !errors.Is(err, tt.want) {
				t.Fatalf("Object() = %d bytes, %v, want %v", len(got), err, tt.want)
			}
			if tt.want == nil && !bytes.Equal(got, data) {
				t.Errorf("%d bytes came back that are not the %d that were stored", len(got), len(data))
			}
		})
	}
}

// The API may be a domain's, which package jetstreamext writes in its own way.
func TestStore_Object_domain(t *testing.T) {
	t.Parallel()
	srv, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, JetStream: true, JetStreamDomain: "hub", StoreDir: t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(doctorPatience) {
		t.Fatal("the server does not start")
	}
	nc, err := nats.Connect(srv.ClientURL(), nats.Timeout(doctorPatience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	domain, err := jetstream.NewWithDomain(nc, "hub")
	if err != nil {
		t.Fatal(err)
	}
	prefix, err := jetstream.NewWithAPIPrefix(nc, "$JS.hub.API.")
	if err != nil {
		t.Fatal(err)
	}
	for name, js := range map[string]jetstream.JetStream{"domain": domain, "prefix": prefix} {
		s, err := dlq.NewStore(nc, js, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: 8 << 20}})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.PutObjects(t.Context(), map[string][]byte{name: noise(1, 300<<10)}); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Object(t.Context(), name); err != nil || len(got) != 300<<10 {
			t.Errorf("%s: Object() = %d bytes, %v", name, len(got), err)
		}
	}
}
