//! Bytes of a hostile peer: no panic, no unbounded memory, and what decodes encodes to the same again.
#![no_main]

use a3s_box_proto::sockets::Events;
use a3s_box_proto::{Decoder, Frame, Reply, Request, frame::MAX_MESSAGE, pack, unpack};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    // The first byte says in what pieces the rest arrives.
    let Some((step, bytes)) = input.split_first() else { return };
    let (mut decoder, mut events) = (Decoder::default(), Events::default());
    for piece in bytes.chunks(usize::from(*step) + 1) {
        decoder.push(piece);
        events.push(piece);
        while let Ok(Some(event)) = events.next_event() {
            let mut again = (Vec::new(), Events::default());
            event.encode(&mut again.0);
            again.1.push(&again.0);
            assert_eq!(again.1.next_event(), Ok(Some(event)));
        }
        while let Ok(Some(frame)) = decoder.next_frame() {
            again(&frame);
            if let Frame::Message(body) = &frame {
                message(body);
            }
        }
        assert!(decoder.pending() <= bytes.len().min(MAX_MESSAGE + 5 + 256) || decoder.next_frame().is_err());
    }
});

fn again(frame: &Frame) {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    let mut decoder = Decoder::default();
    decoder.push(&bytes);
    assert_eq!(decoder.next_frame(), Ok(Some(frame.clone())));
}

fn message(body: &[u8]) {
    if let Ok(request) = unpack::<Request>(body) {
        let Ok(Frame::Message(body)) = pack(&request) else { panic!("not packed again") };
        assert_eq!(unpack::<Request>(&body).as_ref(), Ok(&request));
    }
    if let Ok(reply) = unpack::<Reply>(body) {
        let Ok(Frame::Message(body)) = pack(&reply) else { panic!("not packed again") };
        assert_eq!(unpack::<Reply>(&body).as_ref(), Ok(&reply));
    }
}
