package dlq_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// A record can name any object. What is not as it says is not read: one of 600 MB took
// 3.5 GB of memory.
func TestStore_Fetch_forged(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	ctx := bridgeContext(t)
	bucket, err := s.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "DLQ_LARGE"})
	must(t, err)
	const large = 8 << 20
	_, err = bucket.PutBytes(ctx, "large", make([]byte, large))
	must(t, err)
	_, err = bucket.PutBytes(ctx, "empty", nil)
	must(t, err)
	for name, size := range map[string]uint64{"small meta": 4, "huge meta": 1 << 40, "largest meta": 1<<64 - 1, "too large": 64<<20 + 1} {
		info, err := bucket.PutBytes(ctx, name, make([]byte, large))
		must(t, err)
		info.Size = size
		meta, err := json.Marshal(info)
		must(t, err)
		_, err = s.js.PublishMsg(ctx, &nats.Msg{
			Subject: "$O.DLQ_LARGE.M." + base64.URLEncoding.EncodeToString([]byte(name)), Data: meta, Header: nats.Header{"Nats-Rollup": {"sub"}},
		})
		must(t, err)
	}
	other, err := s.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "others"})
	must(t, err)
	secret, err := other.PutBytes(ctx, "secret", []byte("1234"))
	must(t, err)
	_, err = bucket.AddLink(ctx, "link", secret)
	must(t, err)

	for _, tt := range []struct {
		name, object, size string
		headers            bool
		want               error
	}{
		{name: "larger than it says", object: "large", size: "1", want: dlq.ErrObject},
		{name: "smaller than it says", object: "large", size: fmt.Sprint(1 << 40), want: dlq.ErrObject},
		{name: "one byte less", object: "large", size: fmt.Sprint(large - 1), want: dlq.ErrObject},
		{name: "one byte more", object: "large", size: fmt.Sprint(large + 1), want: dlq.ErrObject},
		{name: "no size", object: "large", size: "", want: dlq.ErrObject},
		{name: "negative", object: "large", size: "-1", want: dlq.ErrObject},
		{name: "no number", object: "large", size: "8 MiB", want: dlq.ErrObject},
		{name: "more than the object says", object: "small meta", size: "4", want: dlq.ErrObject},
		{name: "both say too much", object: "huge meta", size: fmt.Sprint(uint64(1) << 40), want: dlq.ErrObject},
		{name: "more than there are numbers", object: "largest meta", size: fmt.Sprint(uint64(1)<<63 - 1), want: dlq.ErrObject},
		{name: "just too large", object: "too large", size: fmt.Sprint(64<<20 + 1), want: dlq.ErrObject},
		{name: "a link to another bucket", object: "link", size: "4", want: dlq.ErrObject},
		{name: "a link, without a size", object: "link", size: "0", want: dlq.ErrObject},
		{name: "nobody's", object: "none", size: "1", want: jetstream.ErrObjectNotFound},
		{name: "no name", object: "", size: "1", want: jetstream.ErrNameRequired},
		{name: "large headers", object: "large", headers: true, want: dlq.ErrObject},
		{name: "headers of another bucket", object: "link", headers: true, want: dlq.ErrObject},
	} {
		h := nats.Header{dlq.HeaderVersion: {"1"}, dlq.HeaderID: {"abc"}, dlq.HeaderBody: {"object"}, dlq.HeaderBodyObject: {tt.object}, dlq.HeaderBodySize: {tt.size}}
		if tt.headers {
			h = nats.Header{dlq.HeaderVersion: {"1"}, dlq.HeaderID: {"abc"}, dlq.HeaderHeadersObject: {tt.object}}
		}
		before := s.nc.Stats().InBytes
		r, err := s.store.Load(ctx, h, nil)
		if !errors.Is(err, tt.want) || r == nil || r.Data != nil || len(r.Header) > 0 {
			t.Errorf("%s: error %v, want %v, and nothing of it", tt.name, err, tt.want)
		}
		const most = 1 << 20 // what was on its way when the reader ended, at most
		if n := s.nc.Stats().InBytes - before; n > most && tt.object != "small meta" {
			t.Errorf("%s: %d bytes were read", tt.name, n)
		}
	}
	// What is as it says is read.
	for object, size := range map[string]int{"large": large, "empty": 0} {
		r, err := s.store.Load(ctx, nats.Header{
			dlq.HeaderVersion: {"1"}, dlq.HeaderID: {"abc"}, dlq.HeaderBody: {"object"}, dlq.HeaderBodyObject: {object}, dlq.HeaderBodySize: {fmt.Sprint(size)},
		}, nil)
		if err != nil || len(r.Data) != size {
			t.Errorf("%s: %v", object, err)
		}
	}
	if _, err := s.store.Object(ctx, "huge meta"); !errors.Is(err, dlq.ErrObject) {
		t.Errorf("an object for an export: %v, want ErrObject", err)
	}
}
